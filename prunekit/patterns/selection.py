"""Exact top-k selection, the arithmetic that every pattern shares."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float

if TYPE_CHECKING:
    from torch import Tensor


def keep_highest(score: Float[Tensor, "G N"], kept: int) -> Bool[Tensor, "G N"]:
    """Keep exactly ``kept`` entries of each row: the highest; ties keep the lower index.

    NaN counts as lowest. Selection by the k-th value, not by a sort: one quickselect a row.
    """
    import torch

    size = score.shape[1]
    if kept >= size or kept <= 0:
        return torch.full_like(score, kept > 0, dtype=torch.bool)
    score = _without_nan(score)
    threshold = score.kthvalue(size - kept + 1, dim=1, keepdim=True).values
    keep = score >= threshold
    surplus = keep.sum(1) - kept
    for row in surplus.nonzero().flatten().tolist():
        tied = (score[row] == threshold[row]).nonzero().flatten()
        keep[row, tied[len(tied) - int(surplus[row]) :]] = False
    return keep


def keep_n_of_m(score: Float[Tensor, "O I"], n: int, m: int) -> Bool[Tensor, "O I"]:
    """Keep the n highest of every m neighbours in a row; ties keep the lower index.

    The rank of an entry is how many of its group beat it: m(m - 1)/2 comparisons of whole planes
    and no sort. ``m`` must divide I.
    """
    import torch

    planes = _without_nan(score).unflatten(1, (-1, m)).unbind(2)
    beaten = score.new_zeros((m, *planes[0].shape), dtype=torch.int8)
    for first in range(m):
        for second in range(first + 1, m):
            first_wins = planes[first] >= planes[second]
            beaten[second] += first_wins
            beaten[first] += ~first_wins
    return (beaten < n).movedim(0, 2).flatten(1)


def _without_nan(score: Tensor) -> Tensor:
    """Return the scores with NaN as the lowest; looking for one is cheaper than a copy."""
    if not score.sum().isnan():
        return score
    return score.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
