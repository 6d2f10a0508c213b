"""Scores of heads in blocks that share a position bias.

Shapes: U units of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from prunekit.structured.finalize import linear_groups_of

if TYPE_CHECKING:
    from prunekit.models.units.base import UnitGroup
    from prunekit.structured.gated_model import Scores


def share_scores(groups: Sequence[UnitGroup], scores: Scores) -> Scores:
    """Score heads jointly over blocks that share a position bias.

    A stock config keeps the same heads in all blocks of such a stack. Each block counts alike: its
    scores are divided by the sum of their magnitudes. The mean over the blocks gets the mean of
    these sums, so that it compares with scores of other units.

    Args:
        groups: Groups of any kinds.
        scores: Score of each unit [U], by group name.
    """
    stacks: dict[str, list[str]] = {}
    for group in linear_groups_of(groups):
        if group.has_bias_columns:
            stacks.setdefault(group.stack.blocks, []).append(group.name)
    shared: Scores = {}
    for names in stacks.values():
        every = torch.stack([scores[name] for name in names])
        sizes = every.abs().sum(1, keepdim=True)
        mean = (every / sizes.clamp_min(1e-300)).mean(0) * sizes.mean()
        shared |= dict.fromkeys(names, mean)
    return scores | shared
