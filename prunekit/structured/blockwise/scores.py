"""Scores of units, gathered block by block.

Shapes: U units of a group.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from prunekit.models.units.base import UnitGroup
from prunekit.models.units.blocks import BlockGroup
from prunekit.models.units.hidden import HiddenGroup
from prunekit.structured.blockwise.block_forward import BlockForward
from prunekit.structured.blockwise.block_passes import BlockPasses
from prunekit.structured.blockwise.outside_forward import OutsideForward
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers import Ranker

Part = BlockForward | OutsideForward
"""A part of the model that is loaded by itself."""


def score_blockwise(ranker: Ranker, gated: GatedModel, passes: BlockPasses) -> Scores:
    """Return the score of each unit, measured block by block.

    Args:
        ranker: The ranker.
        gated: The model and its gates.
        passes: Passes over the same model with the same batches.
    """
    parts = ranker.components
    measured: list[Scores] = [{} if part.needs_weights else part.measure(gated) for part in parts]
    by_block = [pair for pair in zip(parts, measured, strict=True) if pair[0].needs_weights]
    norms = [norm for each in gated.groups for norm in getattr(each, "norms", ())]
    for block in _blocks_for([part for part, _ in by_block], passes, norms):
        groups = groups_in(gated.groups, block)
        for part, scores in by_block if groups else ():
            view = replace(gated, groups=groups, part=block)
            _merge(scores, part.measure(view), groups, block)
    # In the order of the groups, as rankers of the whole model return them.
    measured = [{group.name: scores[group.name] for group in gated.groups} for scores in measured]
    if parts != [ranker]:
        measured = [part.combine([each]) for part, each in zip(parts, measured, strict=True)]
    return ranker.combine(measured)


def _blocks_for(
    parts: Sequence[Ranker], passes: BlockPasses, norms: Sequence[nn.Module]
) -> Iterator[Part]:
    """Yield parts of the model with the inputs that rankers need."""
    if norms and any(part.compares_losses for part in parts):
        return passes.whole()
    if any(part.needs_loss for part in parts):
        return passes.backward(norms)
    if any(part.needs_data for part in parts):
        return passes.forward()
    if not parts:
        return iter(())
    return chain(passes.loaded(), passes.outside() if norms else ())


def groups_in(groups: Sequence[UnitGroup], part: Part) -> list[Any]:
    """Return the groups with units in a part of the model.

    Of coordinates, which are in all parts, it is the group in this one alone.
    """
    found: list[UnitGroup] = []
    for group in groups:
        if isinstance(group, HiddenGroup):
            found.append(group.part(part.modules))
        elif isinstance(part, BlockForward) and group.is_in(part.inputs.module):
            found.append(group)
    return found


def _merge(
    scores: Scores, found: Mapping[str, torch.Tensor], groups: Sequence[UnitGroup], part: Part
) -> None:
    """Add the scores of a part's units, or of the block itself."""
    for group in groups:
        if isinstance(group, BlockGroup):
            assert isinstance(part, BlockForward)
            index = part.inputs.index
            total = scores.setdefault(group.name, torch.zeros(group.units, dtype=torch.float64))
            total[index] = found[group.name][index]
        elif isinstance(group, HiddenGroup) and group.name in scores:
            scores[group.name] = scores[group.name] + found[group.name]
        else:
            scores[group.name] = found[group.name]
