"""Block by block compensation for units that will be removed.

``refit`` fits the linears that read units anew; ``bias`` adds the mean output of the removed units
to their bias: b + W_P E[x_P] (An et al. 2024, arXiv:2312.11983, eq. 8).

Shapes: N samples, T tokens, I inputs of a linear that reads units, C removed columns.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from prunekit_kernels import gram, mirror
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.architectures import find_architecture
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.models.layout import stack_runners
from prunekit.models.orientation import weight_matrix
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.models.sequential.pipeline import iterate_blocks
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.models.units.kinds import Compensation
from prunekit.structured.batches import Batch
from prunekit.structured.refit import refit


def compensate(
    model: PreTrainedModel,
    groups: Sequence[LinearUnitGroup],
    kept: Mapping[str, Sequence[int]],
    batches: Sequence[Batch],
    how: Compensation = "refit",
    ranks: Ranks = SINGLE,
) -> Iterator[str]:
    """Compensate reading linears for removed units; yield the blocks' names.

    A linear is fitted to the inputs that it has once the units of everything before it are removed.
    The weights of removed units are set to 0; the model is changed in place and needs no gates.

    Args:
        model: The model with its weights.
        groups: Groups of one or several kinds.
        kept: Kept units of each group.
        batches: Calibration batches of this rank, without padding, on the device of the model.
        how: "refit", or "bias", for which each of these linears must have a bias.
        ranks: Processes with the same model and other tokens.
    """
    readers = removed_readers(groups, kept)
    stacks = stack_runners(model, find_architecture(model))
    for block in iterate_blocks(model, stacks, None, batches, ranks):
        compensate_block(block, readers, kept, how)
        yield block.name


def removed_readers(
    groups: Iterable[LinearUnitGroup], kept: Mapping[str, Sequence[int]]
) -> dict[nn.Module, LinearUnitGroup]:
    """Return the groups with removed units, by their reading linear."""
    return {group.reader.linear: group for group in groups if len(kept[group.name]) < group.units}


def compensate_block(
    block: LoadedBlock,
    readers: Mapping[nn.Module, LinearUnitGroup],
    kept: Mapping[str, Sequence[int]],
    how: Compensation,
) -> list[LinearUnitGroup]:
    """Compensate the reading linears of a block in run order.

    Args:
        block: The block with its inputs; its weights are changed in place.
        readers: From :func:`removed_readers`.
        kept: Kept units of each group.
        how: "refit" or "bias".

    Returns:
        The groups whose reading linear was changed.
    """
    groups = [readers[module] for module in block.module.modules() if module in readers]
    if not groups:
        return []
    paths = {module: path for path, module in block.module.named_modules()}
    by_path = {paths[group.reader.linear]: group for group in groups}
    order = block.execution_order(by_path)
    block.begin_stages([[path] for path in order])
    for path in order:
        group = by_path[path]
        removed = torch.ones(group.units, dtype=torch.bool)
        removed[list(kept[group.name])] = False
        columns = group.reader.index[removed].flatten().to(block.device)
        if how == "refit":
            refit(group, _gram(block, path), kept[group.name])
        else:
            _add_mean(block, path, columns)
        with torch.no_grad():
            weight_matrix(group.reader.linear)[:, columns] = 0
        block.settle_stage()
    return groups


def _gram(block: LoadedBlock, path: str) -> Float[Tensor, "I I"]:
    """Return XᵀX of a linear's input, divided by the number of tokens."""
    inputs, tokens = weight_matrix(block.module.get_submodule(path)).shape[1], 0
    total = torch.zeros(inputs, inputs, device=block.device)
    for x in block.inputs_of(path):
        rows = x.flatten(0, -2)
        gram(rows, total)
        tokens += len(rows)
    block.ranks.all_reduce_sum(total, "statistics")
    return mirror(total).div_(sum(block.ranks.all_gather_object(tokens)))


@torch.no_grad()
def _add_mean(block: LoadedBlock, path: str, columns: Int[Tensor, " C"]) -> None:
    """Add the mean output of some columns to the bias."""
    total = torch.zeros(len(columns), dtype=torch.float64, device=columns.device)
    tokens = 0
    for x in block.inputs_of(path):
        rows = x.flatten(0, -2)
        total += rows[:, columns].double().sum(0)
        tokens += len(rows)
    block.ranks.all_reduce_sum(total, "statistics")
    mean = total / sum(block.ranks.all_gather_object(tokens))
    linear = block.module.get_submodule(path)
    bias = cast("Tensor", linear.bias)
    bias += (weight_matrix(linear)[:, columns].double() @ mean).to(bias)
