"""Spread: selection among the rows of several processes, each of which holds some, in their order.

The scores stay where they are. Rounds find the key of the last weight that goes, some bits of it at
a time: each process counts, for its keys that agree with what is known, how often each
next digit occurs, and the counts are added up. Then each says how many of its keys tie with it, and
of those the last ones go. Counts are integers, so all of this is exact and the same as
:func:`prunekit_kernels.selection.choose` gives for the whole matrix.
Shapes: O output features of this process, I input features, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from prunekit_kernels.groups import Groups
from prunekit_kernels.selection import choose, drop_last, row_sums, without_nan

ROUNDS = {
    torch.int32: ((21, 11), (10, 11), (0, 10)),
    torch.int64: ((53, 11), (42, 11), (31, 11), (20, 11), (9, 11), (0, 9)),
}
"""Shift and width of each digit of a key."""


@dataclass(frozen=True)
class PeerRows:
    """The processes that hold the other rows.

    Attributes:
        rank: Which one this is; lower ones hold earlier rows.
        size: How many there are.
        outputs: Rows of all.
        add: Adds up a tensor over all of them, in place.
    """

    rank: int
    size: int
    outputs: int
    add: Callable[[Tensor], None]


def choose_spread(
    score: Float[Tensor, "O I"], groups: Groups, others: PeerRows
) -> Bool[Tensor, "O I"]:
    """Return what stays of the rows that are here; every process has to call it.

    Args:
        score: Higher stays, ties keep the lower index, NaN counts as lowest. float64 is compared
            as such, others as float32.
        groups: Of the whole matrix. A tile lies within one process, or is as high as the matrix.
        others: The other processes.

    Raises:
        ValueError: The groups do not divide this matrix.
    """
    groups.check(others.outputs, score.shape[1])
    if groups.rows == 1:
        return choose(score, groups)
    if groups.tile == (1, 1):
        return _choose(score, groups, others)
    return _tiles(score, groups, others)


def _choose(score: Tensor, groups: Groups, others: PeerRows) -> Tensor:
    columns, every = max(groups.columns or score.shape[1], 1), _keys(score)
    windows = [part.reshape(-1) for part in every.split(columns, 1)]
    left = torch.tensor(groups.pruned, device=score.device)
    threshold = torch.zeros_like(left)
    for shift, width in ROUNDS[every.dtype]:
        counts = torch.stack(
            [
                _histogram(keys, int(known), shift, width)
                for keys, known in zip(windows, threshold.tolist(), strict=True)
            ]
        )
        others.add(counts)
        until = counts.cumsum(1)
        digit = (until < left[:, None]).sum(1).clamp_(max=(1 << width) - 1)
        left = left - (until - counts).gather(1, digit[:, None])[:, 0]
        threshold = threshold << width | digit
    # As numbers with a sign, in which order keys are held.
    limits = (threshold + torch.iinfo(every.dtype).min).tolist()
    ties = torch.zeros((others.size, len(windows)), dtype=torch.int64, device=score.device)
    for group, (keys, limit) in enumerate(zip(windows, limits, strict=True)):
        ties[others.rank, group] = (keys == limit).sum()
    own = ties[others.rank].clone()
    others.add(ties)
    surplus = (left - ties[others.rank + 1 :].sum(0)).clamp_(min=0).minimum(own)
    keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    for group, (keys, limit) in enumerate(zip(windows, limits, strict=True)):
        chosen = (keys >= limit)[None]
        drop_last(chosen, (keys == limit)[None], surplus[group, None])
        window = keep[:, group * columns : (group + 1) * columns]
        window.copy_(chosen.view(window.shape))
    return keep


def _keys(score: Tensor) -> Tensor:
    """Return integers that order as the scores do; zeros of both signs are one."""
    whole = torch.int64 if score.dtype == torch.float64 else torch.int32
    limits = torch.iinfo(whole)
    bits = without_nan(score if limits.bits == 64 else score.float()).add(0.0).view(whole)
    return bits ^ (bits >> (limits.bits - 1) & limits.max)


def _histogram(keys: Tensor, known: int, shift: int, width: int) -> Int64[Tensor, " D"]:
    """Count the digits at ``shift`` of the keys whose digits above it are ``known``."""
    limits = torch.iinfo(keys.dtype)
    unsigned, above = keys ^ limits.min, limits.bits - shift - width
    if above:
        unsigned = unsigned[unsigned >> (shift + width) & ((1 << above) - 1) == known]
    return torch.bincount(unsigned >> shift & ((1 << width) - 1), minlength=1 << width)


def _tiles(score: Tensor, groups: Groups, others: PeerRows) -> Tensor:
    height, width = groups.tile
    whole = height == others.outputs
    own = len(score) if whole else height
    # In float64, as in one process.
    total = row_sums(without_nan(score), own).unflatten(1, (-1, width)).sum(2)
    units = Groups(None, None, groups.pruned)
    if whole:
        others.add(total)
        keep = choose(total, units)
    else:
        rest = PeerRows(others.rank, others.size, others.outputs // height, others.add)
        keep = _choose(total, units, rest)
    return keep.repeat_interleave(width, 1).repeat_interleave(own, 0)
