"""Sharded selection: among rows that several processes hold, in order.

Scores are not moved. Rounds find the key of the last pruned weight, some bits at a time: each
process counts how often each next digit occurs among its keys with the known prefix, and the counts
are summed over processes. Then each process reports its ties, and the last of all ties are pruned.
Counts are integers, so the result is exact and equals :func:`prunekit_kernels.selection.choose` on
the whole matrix.
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
"""Shift and width of each digit of a key, from the highest to the lowest."""


@dataclass(frozen=True)
class PeerRows:
    """The processes that hold the other rows of a matrix.

    Attributes:
        rank: Index of this process; lower ones hold earlier rows.
        size: Number of processes.
        outputs: Rows of the whole matrix.
        add: All-reduces a tensor by summation, in place.
    """

    rank: int
    size: int
    outputs: int
    add: Callable[[Tensor], None]


def choose_spread(
    score: Float[Tensor, "O I"], groups: Groups, others: PeerRows
) -> Bool[Tensor, "O I"]:
    """Return the keep mask of this process's rows; collective.

    Every process must call it.

    Args:
        score: Higher is kept, ties keep the lower index, NaN counts as lowest. Float64 is compared
            as float64, other types as float32.
        groups: Groups of the whole matrix. A tile lies within one process or is as high as the
            matrix.
        others: The other processes.

    Raises:
        ValueError: The groups do not divide the whole matrix.
    """
    groups.check(others.outputs, score.shape[1])
    if groups.rows == 1:
        return choose(score, groups)
    if groups.tile == (1, 1):
        return _choose(score, groups, others)
    return _tiles(score, groups, others)


def _choose(score: Tensor, groups: Groups, others: PeerRows) -> Tensor:
    columns, all_keys = max(groups.columns or score.shape[1], 1), _keys(score)
    windows = [part.reshape(-1) for part in all_keys.split(columns, 1)]
    to_prune = torch.tensor(groups.pruned, device=score.device)
    threshold = torch.zeros_like(to_prune)
    for shift, width in ROUNDS[all_keys.dtype]:
        counts = torch.stack(
            [
                _histogram(keys, int(prefix), shift, width)
                for keys, prefix in zip(windows, threshold.tolist(), strict=True)
            ]
        )
        others.add(counts)
        cumulative = counts.cumsum(1)
        digit = (cumulative < to_prune[:, None]).sum(1).clamp_(max=(1 << width) - 1)
        to_prune = to_prune - (cumulative - counts).gather(1, digit[:, None])[:, 0]
        threshold = threshold << width | digit
    # As signed integers, which is how keys are stored.
    limits = (threshold + torch.iinfo(all_keys.dtype).min).tolist()
    ties = torch.zeros((others.size, len(windows)), dtype=torch.int64, device=score.device)
    for group, (keys, limit) in enumerate(zip(windows, limits, strict=True)):
        ties[others.rank, group] = (keys == limit).sum()
    own = ties[others.rank].clone()
    others.add(ties)
    surplus = (to_prune - ties[others.rank + 1 :].sum(0)).clamp_(min=0).minimum(own)
    keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    for group, (keys, limit) in enumerate(zip(windows, limits, strict=True)):
        chosen = (keys >= limit)[None]
        drop_last(chosen, (keys == limit)[None], surplus[group, None])
        window = keep[:, group * columns : (group + 1) * columns]
        window.copy_(chosen.view(window.shape))
    return keep


def _keys(score: Tensor) -> Tensor:
    """Return integers in the order of the scores; −0 equals 0."""
    whole = torch.int64 if score.dtype == torch.float64 else torch.int32
    limits = torch.iinfo(whole)
    bits = without_nan(score if limits.bits == 64 else score.float()).add(0.0).view(whole)
    return bits ^ (bits >> (limits.bits - 1) & limits.max)


def _histogram(keys: Tensor, prefix: int, shift: int, width: int) -> Int64[Tensor, " D"]:
    """Count the digits at ``shift`` among the keys that begin with ``prefix``."""
    limits = torch.iinfo(keys.dtype)
    unsigned, above = keys ^ limits.min, limits.bits - shift - width
    if above:
        unsigned = unsigned[unsigned >> (shift + width) & ((1 << above) - 1) == prefix]
    return torch.bincount(unsigned >> shift & ((1 << width) - 1), minlength=1 << width)


def _tiles(score: Tensor, groups: Groups, others: PeerRows) -> Tensor:
    height, width = groups.tile
    whole = height == others.outputs
    own = len(score) if whole else height
    # In float64, as for a single process.
    total = row_sums(without_nan(score), own).unflatten(1, (-1, width)).sum(2)
    units = Groups(None, None, groups.pruned)
    if whole:
        others.add(total)
        keep = choose(total, units)
    else:
        rest = PeerRows(others.rank, others.size, others.outputs // height, others.add)
        keep = _choose(total, units, rest)
    return keep.repeat_interleave(width, 1).repeat_interleave(own, 0)
