"""Selection: which weights to keep, by exact counts within groups.

In each group the ``pruned`` units with the lowest scores are pruned. Ties keep the lower index, and
NaN counts as lowest. The threshold is the k-th value; nothing is sorted.
Shapes: O output features, I input features, G groups, N members of a group.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit_kernels import _select, _select_radix, _source
from prunekit_kernels._triton import runs_triton
from prunekit_kernels.groups import Groups
from prunekit_kernels.packed_mask import INTEGERS, unpack

PIECE = 16  # rows summed at once
CHUNK = 1 << 18  # scores processed together on the CPU: as many as its caches hold
SAMPLED = 61  # every 61st score is sampled to bracket the threshold; odd, to meet every column
LONG = 1 << 15  # group size from which sampling pays off


def choose(score: Float[Tensor, "O I"], groups: Groups) -> Bool[Tensor, "O I"]:
    """Return the keep mask of scores.

    Args:
        score: Higher is kept; any strides. Float64 runs in PyTorch on all devices.
        groups: The groups and their counts.

    Raises:
        ValueError: The groups do not divide this matrix.
    """
    groups.check(*score.shape)
    return _choose(score, groups.numbers())


def choose_reference(score: Float[Tensor, "O I"], groups: Groups) -> Bool[Tensor, "O I"]:
    """Return the same mask by sorting, as the published tools do."""
    height, width = groups.tile
    units = score.double().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    units = units.unflatten(0, (-1, height)).unflatten(2, (-1, width)).sum((1, 3)).nan_to_num(
        nan=-math.inf, posinf=math.inf, neginf=-math.inf
    )  # fmt: skip
    keep = torch.ones_like(units, dtype=torch.bool)
    rows, columns = groups.rows or len(units), groups.columns or units.shape[1]
    for top in range(0, len(units), max(rows, 1)):
        for number, start in enumerate(range(0, units.shape[1], max(columns, 1))):
            window = slice(top, top + rows), slice(start, start + columns)
            group = units[window].flatten()
            pruned = groups.pruned[number if groups.rows is None else 0]
            # Reversed, a stable sort puts the higher index of a tie first.
            lowest = len(group) - 1 - group.flip(0).argsort(stable=True)[:pruned]
            mask = torch.ones_like(group, dtype=torch.bool).index_fill(0, lowest, 0)
            keep[window] = mask.view(keep[window].shape)
    return keep.repeat_interleave(height, 0).repeat_interleave(width, 1)


def plain(score: Float[Tensor, "O I"], groups: Groups) -> Bool[Tensor, "O I"]:
    """Return the keep mask in vectorised PyTorch."""
    if groups.tile != (1, 1):
        return _tiles(score, groups)
    if groups.rows is None:
        columns = max(groups.columns or score.shape[1], 1)
        keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
        for start, pruned in zip(range(0, score.shape[1], columns), groups.pruned, strict=False):
            window = score[:, start : start + columns]
            chosen = keep_highest(window.reshape(1, -1), window.numel() - pruned)
            keep[:, start : start + columns] = chosen.view(window.shape)
        return keep
    pruned = groups.pruned[0]
    if groups.columns is not None:
        return keep_neighbours(score, groups.columns - pruned, groups.columns)
    return keep_highest(score, score.shape[1] - pruned)


def row_chunks(groups: Groups, outputs: int, inputs: int) -> Iterator[slice]:
    """Yield slices of rows that can be selected independently.

    Args:
        groups: The groups of the whole matrix.
        outputs: Rows of the matrix.
        inputs: Columns of the matrix.

    Yields:
        As many rows as fit CPU caches where groups are single rows, else all rows.
    """
    single_rows = groups.rows == 1 and groups.tile == (1, 1)
    step = max(1, CHUNK // max(inputs, 1)) if single_rows else max(outputs, 1)
    for start in range(0, outputs, step):
        yield slice(start, start + step)


def keep_highest(score: Float[Tensor, "G N"], kept: int) -> Bool[Tensor, "G N"]:
    """Keep exactly ``kept`` entries of each row, by one quickselect a row."""
    size = score.shape[1]
    if kept >= size or kept <= 0:
        return torch.full_like(score, kept > 0, dtype=torch.bool)
    score = without_nan(score)
    threshold = _value(score, size - kept)
    keep = score >= threshold
    if keep.count_nonzero() != kept * len(keep):  # each row has at least ``kept``
        surplus = keep.sum(1, dtype=torch.int32) - kept
        drop_last(keep, score == threshold, surplus)
    return keep


def _value(score: Tensor, rank: int) -> Float[Tensor, "G 1"]:
    """Return the value at rank ``rank`` of each row in ascending order."""
    if score.is_cuda or score.dtype not in (torch.float32, torch.float64):
        return score.kthvalue(rank + 1, dim=1, keepdim=True).values
    # NumPy's vectorised partition takes a tenth of the time of `kthvalue`.
    if score.shape[1] >= LONG:
        found = np.stack([_long_value(row, rank) for row in score.numpy()])[:, None]
        return torch.from_numpy(found)
    ordered = np.partition(score.numpy(), rank, axis=1)
    return torch.from_numpy(ordered[:, rank : rank + 1].copy())


def _long_value(scores: Any, place: int) -> Any:
    """Return the value at rank ``place``, found near a sampled bracket."""
    sample = scores[::SAMPLED]
    rank, fraction = place / SAMPLED, place / len(scores)
    margin = 4 * math.sqrt(rank * (1 - fraction)) + 2  # four standard deviations of the rank
    ends = max(int(rank - margin), 0), min(int(rank + margin), len(sample) - 1)
    low, high = np.partition(sample, ends)[[*ends]]
    # Of equal scores, such as those of pruned weights, none has to be near.
    place_near = place - np.count_nonzero(scores <= low)
    if place_near < 0 <= place - np.count_nonzero(scores < low):
        return low
    near = scores[(scores > low) & (scores <= high)]
    if 0 <= place_near < len(near):
        return np.partition(near, place_near)[place_near]
    return np.partition(scores, place)[place]  # the sample was not representative


def keep_neighbours(score: Float[Tensor, "O I"], n: int, m: int) -> Bool[Tensor, "O I"]:
    """Keep the n highest of every m neighbours in a row.

    The rank of an entry is the number of entries in its group that beat it: m − 1 comparisons and
    no sort.

    Args:
        score: Any float type; m divides I.
        n: Kept per group.
        m: Group length.
    """
    score = without_nan(score if score.dtype == torch.float64 else score.float())
    if m in INTEGERS and sys.byteorder == "little":
        return _highest_of_words(score.contiguous(), n, m)
    planes = score.unflatten(1, (-1, m)).movedim(2, 0).contiguous()
    return highest(planes, n).movedim(0, 2).flatten(1)


def _highest_of_words(score: Float[Tensor, "O I"], n: int, m: int) -> Bool[Tensor, "O I"]:
    """Keep the n highest, with group flags as bytes of words.

    Scores are not split into planes. Comparisons across groups are masked or shifted out.
    """
    ones = [int.from_bytes(bytes([1] * (m - distance)), "little") for distance in range(m)]
    wins = torch.empty(score.numel(), dtype=torch.bool, device=score.device)
    counts = torch.full((len(wins) // m,), sum(ones[1:]), dtype=INTEGERS[m], device=score.device)
    rivals, won, words, beaten = arrays(score.flatten(), wins, wins.view(INTEGERS[m]), counts)
    for distance in range(1, m):
        won[:-distance] = rivals[:-distance] >= rivals[distance:]
        beaten += words << 8 * distance  # later entries that an earlier one beats
        words &= ones[distance]
        beaten -= words  # minus the later entries that do not beat the earlier one
    (ranks,) = arrays(counts.view(torch.int8))
    return torch.as_tensor(ranks < n).view(score.shape)


def highest(planes: Float[Tensor, "m ..."], n: int) -> Bool[Tensor, "m ..."]:
    """Keep the n highest of the m planes at each position.

    Scores must hold no NaN, and m is at most :data:`prunekit_kernels.groups.NEIGHBOURS`.
    """
    beaten = torch.zeros(planes.shape, dtype=torch.int8, device=planes.device)
    rivals, counts = arrays(planes, beaten)
    for distance in range(1, len(planes)):
        wins = rivals[:-distance] >= rivals[distance:]
        counts[distance:] += wins
        counts[:-distance] += ~wins
    return torch.as_tensor(counts < n)


def arrays(*tensors: Tensor) -> tuple[Any, ...]:
    """Return NumPy views of CPU tensors; others are returned unchanged.

    Small NumPy calls take a fifth of PyTorch's time. Use only operators that both understand.
    """
    return tuple(tensor.numpy() if tensor.device.type == "cpu" else tensor for tensor in tensors)


def drop_last(keep: Tensor, tied: Tensor, surplus: Tensor) -> None:
    """Clear the last ``surplus`` tied entries of each row, in place.

    Args:
        keep: Mask that is changed.
        tied: Entries that tie with the threshold; overwritten.
        surplus: How many to clear in each row.
    """
    tied &= (surplus > 0)[:, None]
    row, column = tied.nonzero(as_tuple=True)
    count = torch.bincount(row, minlength=len(tied))
    rank = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    last = rank >= (count - surplus)[row]
    keep[row[last], column[last]] = False


def _tiles(score: Tensor, groups: Groups) -> Tensor:
    height, width = groups.tile
    sums = row_sums(without_nan(score), height).unflatten(1, (-1, width)).sum(2)
    keep = plain(sums, replace(groups, tile=(1, 1)))
    return keep.repeat_interleave(width, 1).repeat_interleave(height, 0)


def row_sums(score: Float[Tensor, "O I"], height: int) -> Float[Tensor, "R I"]:
    """Sum every ``height`` rows in float64, in pieces that fit the cache."""
    tall = score.new_zeros((len(score) // height, score.shape[1]), dtype=torch.float64)
    step = max(PIECE // height, 1) * height
    for start in range(0, len(score), step):
        rows = score[start : start + step].unflatten(0, (-1, height))
        part = tall[start // height : (start + step) // height]
        for piece in rows.split(PIECE, 1):
            part += piece.double().sum(1)
    return tall


def without_nan(score: Tensor) -> Tensor:
    """Return the scores with NaN as −inf.

    The sum shows whether there is any NaN, which is cheaper than a copy.
    """
    if not score.sum().isnan():
        return score
    return score.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


@torch.library.custom_op("prunekit::choose", mutates_args=())
def _choose(score: Tensor, groups: list[int]) -> Tensor:
    chosen = Groups.of(groups)
    if runs_triton(score) and score.dtype != torch.float64:
        if _select.spans_programs(score, chosen):
            return _select_radix.choose(_source.scores(score), chosen)
        return unpack(_select.launch(_source.scores(score), chosen), score.shape[1])
    return plain(score, chosen).contiguous()


@_choose.register_fake
def _(score: Tensor, groups: list[int]) -> Tensor:  # noqa: ARG001
    return score.new_empty(score.shape, dtype=torch.bool)
