"""Scores of units, gathered block by block.

Shapes: U units of a group.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from prunekit.models.units.base import UnitGroup
from prunekit.models.units.blocks import BlockGroup
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.structured.blockwise.block_forward import BlockForward, BlockInputs
from prunekit.structured.blockwise.block_passes import BlockPasses
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers import Ranker


def score_blockwise(ranker: Ranker, gated: GatedModel, passes: BlockPasses) -> Scores:
    """Return the score of each unit, measured block by block.

    Args:
        ranker: The ranker.
        gated: The model and its gates on heads, neurons or blocks.
        passes: Passes over the same model with the same batches.
    """
    parts = ranker.components
    measured: list[Scores] = [{} if part.needs_weights else part.measure(gated) for part in parts]
    by_block = [pair for pair in zip(parts, measured, strict=True) if pair[0].needs_weights]
    for block in _blocks_for([part for part, _ in by_block], passes):
        groups = groups_in(gated.groups, block.inputs)
        for part, scores in by_block if groups else ():
            view = replace(gated, groups=groups, part=block)
            _merge(scores, part.measure(view), groups, block.inputs.index)
    # In the order of the groups, as rankers of the whole model return them.
    measured = [{group.name: scores[group.name] for group in gated.groups} for scores in measured]
    if parts != [ranker]:
        measured = [part.combine([each]) for part, each in zip(parts, measured, strict=True)]
    return ranker.combine(measured)


def _blocks_for(parts: Sequence[Ranker], passes: BlockPasses) -> Iterator[BlockForward]:
    """Yield the blocks with the inputs that the rankers need."""
    if any(part.needs_loss for part in parts):
        return passes.backward()
    if any(part.needs_data for part in parts):
        return passes.forward()
    return passes.loaded() if parts else iter(())


def groups_in(groups: Sequence[UnitGroup], inputs: BlockInputs) -> list[Any]:
    """Return the groups with units in a block."""
    return [
        group
        for group in groups
        if (isinstance(group, LinearUnitGroup) and group.block is inputs.module)
        or (isinstance(group, BlockGroup) and inputs.module in group.blocks)
    ]


def _merge(
    scores: Scores, found: Mapping[str, torch.Tensor], groups: Sequence[UnitGroup], index: int
) -> None:
    """Add the scores of a block's units, or of the block itself."""
    for group in groups:
        if isinstance(group, BlockGroup):
            total = scores.setdefault(group.name, torch.zeros(group.units, dtype=torch.float64))
            total[index] = found[group.name][index]
        else:
            scores[group.name] = found[group.name]
