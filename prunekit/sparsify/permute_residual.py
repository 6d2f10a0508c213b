"""The residual stream in a better order, for n:m in all linears that read it.

Blocks write it and read it through norms that treat its coordinates alike, so these may stand in
any order that is the same all through the model: along every axis on which they lie entries move
together, and the model answers what it did, up to the order in which a sum is added up.

It is found in the dense model, in a walk of its own before the first block is pruned. Every linear
that reads the stream counts as much as any other.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.architectures import find
from prunekit.checkpoint.reader import Checkpoint
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError, ShapeError
from prunekit.models.layout import Block
from prunekit.models.sequential.pipeline import LoadedBlock
from prunekit.models.units.hidden import coordinates
from prunekit.models.weight_names import unread
from prunekit.patterns.n_of_m import NOfM
from prunekit.sparsify.calibrate import gather
from prunekit.sparsify.channel_order import order
from prunekit.sparsify.permute_channels import saliency
from prunekit.sparsify.recipe import Recipe
from prunekit.statistics import ColumnEnergy

Axes = Mapping[str, int]
"""Name of a parameter → the axis along which the coordinates lie."""
ROWS = 4096
"""Rows that are looked at, of all linears together; at least one of each."""


def residual_axes(model: PreTrainedModel) -> Axes:
    """Return where the coordinates of the residual stream lie.

    Raises:
        ConfigError: Nobody can say.
    """
    refused = 'permute = "residual": {} permute = true moves what is within blocks alone.'
    if find(model).stream is None:
        kind = model.config.model_type
        raise ConfigError(refused.format(f"nobody says where models of type {kind!r} have it."))
    names = {module: name for name, module in model.named_modules()}
    try:
        return {f"{names[each.module]}.{each.name}": each.axis for each in coordinates(model)}
    except ShapeError as error:
        raise ConfigError(refused.format(error)) from error


def residual_order(
    visits: Iterable[tuple[LoadedBlock, Block]],
    blocks: Sequence[Block],
    axes: Axes,
    recipe: Recipe,
    ranks: Ranks = SINGLE,
) -> list[int] | None:
    """Return the coordinates in the order in which the dense model loses least to n:m.

    None where nothing is pruned that reads them.

    Args:
        visits: A walk over the whole dense model; all ranks take it, with their own samples.
        blocks: What is pruned of it.
        axes: What :func:`residual_axes` returns.
        recipe: How that is pruned.
        ranks: Who walk.
    """
    pruned = [linear for block in blocks for linear in block.pruned]
    readers = {linear for linear in pruned if axes.get(f"{linear.name}.weight") == 1}
    pattern = recipe.pattern
    if not readers or not isinstance(pattern, NOfM):
        return None
    each, found = -(-ROWS // len(readers)), list[Tensor]()
    for visit, block in visits:
        stages = [[*filter(readers.__contains__, stage)] for stage in block.pruned_stages]
        for linears, stats in gather(visit, [*filter(None, stages)], (ColumnEnergy,)):
            for linear in linears:
                whole = saliency(visit, linear, stats)
                rows = whole[:: -(-len(whole) // each)]
                found.append(rows / rows.sum().clamp_min(1e-30))
    return ranks.run_on_main(lambda: order(torch.cat(found), pattern, 2 * ROWS).tolist())


def check_moves(model: PreTrainedModel, checkpoint: Checkpoint, stored: Mapping[str, str]) -> None:
    """Refuse a checkpoint with tensors of the stream's width of which the model knows nothing.

    Raises:
        ConfigError: So it is.
    """
    for name, _ in unread(checkpoint, stored, {model.config.hidden_size}):
        raise ConfigError(
            f'permute = "residual": {type(model).__name__}, which config.json names, does not '
            f"read {name}, so that nobody says how to move it. Correct `architectures` there, "
            "or take permute = true."
        )


@torch.no_grad()
def reorder(model: PreTrainedModel, axes: Axes, order: Sequence[int]) -> None:
    """Put the coordinates of a model's stream into an order, in place; tied parameters once."""
    index = torch.tensor(order, device=model.device)
    for value, axis in {model.get_parameter(name): axis for name, axis in axes.items()}.items():
        value.copy_(value.index_select(axis, index))
