"""Permute the residual stream, so that an n:m pattern costs less.

Norms treat the coordinates of the stream alike, so any order that is the same throughout the model
leaves its output unchanged up to rounding: along every axis that indexes coordinates, entries are
permuted together.

The order is found in the dense model, in an iteration over all blocks before the first is pruned.
All linears that read the stream have equal weight.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.architectures import find_architecture
from prunekit.checkpoint.reader import Checkpoint
from prunekit.checkpoint.views import TensorView
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError, ShapeError
from prunekit.models.layout import Block
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.models.units.coordinates import coordinate_axes
from prunekit.models.weight_names import unused_tensors
from prunekit.patterns.n_of_m import NOfM
from prunekit.sparsify.calibrate import gather_statistics
from prunekit.sparsify.channel_order import find_channel_order
from prunekit.sparsify.permute_channels import weight_saliency
from prunekit.sparsify.recipe import Recipe
from prunekit.statistics import ColumnEnergy

Axes = Mapping[str, int]
"""Name of a parameter → its axis that indexes coordinates of the residual stream."""
ROWS = 4096
"""Rows used of all linears together; at least one of each."""


def residual_axes(model: PreTrainedModel) -> Axes:
    """Return the axes along which the residual stream's coordinates lie.

    Raises:
        ConfigError: The architecture declares no stream, or a parameter's axis is unclear.
    """
    refused = 'permute = "residual": {} permute = true reorders within blocks only.'
    if find_architecture(model).stream is None:
        kind = model.config.model_type
        raise ConfigError(
            refused.format(f"no architecture declares where models of type {kind!r} have it.")
        )
    names = {module: name for name, module in model.named_modules()}
    try:
        return {f"{names[each.module]}.{each.name}": each.axis for each in coordinate_axes(model)}
    except ShapeError as error:
        raise ConfigError(refused.format(error)) from error


def residual_order(
    loaded_blocks: Iterable[tuple[LoadedBlock, Block]],
    blocks: Sequence[Block],
    axes: Axes,
    recipe: Recipe,
    ranks: Ranks = SINGLE,
) -> list[int] | None:
    """Return the order of coordinates that suits the pattern best.

    None if no pruned linear reads the stream.

    Args:
        loaded_blocks: An iteration over all blocks of the dense model, with this rank's samples.
        blocks: All blocks and their linears.
        axes: Axes of the coordinates, from :func:`residual_axes`.
        recipe: The settings.
        ranks: The processes that iterate together.
    """
    pruned = [linear for block in blocks for linear in block.pruned]
    readers = {linear for linear in pruned if axes.get(f"{linear.name}.weight") == 1}
    pattern = recipe.pattern
    if not readers or not isinstance(pattern, NOfM):
        return None
    each, found = -(-ROWS // len(readers)), list[Tensor]()
    for loaded, block in loaded_blocks:
        stages = [[*filter(readers.__contains__, stage)] for stage in block.pruned_stages]
        for linears, stats in gather_statistics(loaded, [*filter(None, stages)], (ColumnEnergy,)):
            for linear in linears:
                saliency = weight_saliency(loaded, linear, stats)
                rows = saliency[:: -(-len(saliency) // each)]
                found.append(rows / rows.sum().clamp_min(1e-30))
        loaded.checks.settle()
    return ranks.run_on_main(
        lambda: find_channel_order(torch.cat(found), pattern, 2 * ROWS).tolist()
    )


def residual_views(
    order: Sequence[int], axes: Axes, stored: Mapping[str, str]
) -> dict[str, TensorView]:
    """Return views of the stored tensors with a permuted residual stream.

    Args:
        order: Its coordinates in their new order.
        axes: Parameter axes of it, from :func:`residual_axes`.
        stored: Names of parameters → their names in the checkpoint.
    """
    views, index = {}, torch.tensor(order)
    for name, axis in axes.items():
        permute = partial(torch.index_select, dim=axis, index=index)
        views[stored[name]] = TensorView(stored[name], permute)
    return views


def check_moves(model: PreTrainedModel, checkpoint: Checkpoint, stored: Mapping[str, str]) -> None:
    """Refuse a checkpoint with unused tensors of the stream's width.

    Args:
        model: The model without weights.
        checkpoint: Its files.
        stored: Names of parameters → their names in the files.

    Raises:
        ConfigError: The model reads no such tensor, so it cannot be known how to permute it.
    """
    for name, _ in unused_tensors(checkpoint, stored, {model.config.hidden_size}):
        raise ConfigError(
            f'permute = "residual": {type(model).__name__}, which config.json names, does not '
            f"read {name}, so that it is unknown how to permute it. Correct `architectures` there, "
            "or take permute = true."
        )


@torch.no_grad()
def permute_residual(model: PreTrainedModel, axes: Axes, order: Sequence[int]) -> None:
    """Permute the coordinates of a model's residual stream, in place.

    Args:
        model: The model with its weights; tied parameters are permuted once.
        axes: Axes of the coordinates, from :func:`residual_axes`.
        order: Present number of the coordinate at each new place.
    """
    index = torch.tensor(order, device=model.device)
    for value, axis in {model.get_parameter(name): axis for name, axis in axes.items()}.items():
        value.copy_(value.index_select(axis, index))
