"""Thresholds of groups that no single program can see: one pass for each byte of the keys.

Keys have four bytes, those of float64 scores eight. Each pass counts, for the keys that agree with
the threshold so far, how often each next byte occurs; then the byte in which the count to prune is
reached is known. Counts are integers, so that atomic additions give the same each time. Ties are
cut at an index: another pass counts them row by row, and the row in which the cut falls is looked
at once more. The last pass writes.
Shapes: O output features, I input features, G groups, P programs.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunekit_kernels._select_keys import key_of, score_at, write
from prunekit_kernels._triton import tl, triton

if TYPE_CHECKING:
    from prunekit_kernels._source import Source
    from prunekit_kernels.groups import Groups

TILE_I = 1024
ROWS = 16  # of one group that a program counts


def launch(source: "Source", groups: "Groups", bits: Tensor) -> None:
    """Choose, write, and fill the packed bits [O, B]."""
    outputs, inputs = source.x.shape
    width = min(groups.columns or inputs, inputs)
    windows = triton.cdiv(inputs, width)
    apart = groups.rows == 1
    device = source.x.device
    # How many of the keys still in question have to go, of each group.
    left = torch.tensor(groups.pruned, device=device).clamp_(min=0)
    left = left.expand(outputs) if apart else left
    size = 8 if source.x.dtype == torch.float64 else 4
    whole = torch.int64 if size == 8 else torch.int32
    prefix = torch.zeros(len(left), dtype=whole, device=device)
    rows = 1 if apart or outputs == 1 else ROWS
    tile = min(TILE_I, triton.next_power_of_2(width))
    grid = (triton.cdiv(outputs, rows), windows * triton.cdiv(width, tile))
    place = {"APART": apart, "TILE_I": tile, "num_warps": 4}
    for shift in range(8 * size - 8, -1, -8):
        counts = torch.zeros((len(left), 256), dtype=torch.int32, device=device)
        _count_kernel[grid](
            *source.arguments(), width, prefix, counts, SHIFT=shift, TOP=8 * size - 8,
            ROWS=rows, **place, **source.options(),
        )  # fmt: skip
        until = counts.cumsum(1)
        byte = (until < left[:, None]).sum(1).clamp_(max=255)
        left = left - (until - counts).gather(1, byte[:, None])[:, 0]
        # The highest byte of a key has a sign.
        prefix = byte.to(whole) - 128 if shift == 8 * size - 8 else prefix << 8 | byte.to(whole)
    cut = _cut(source, width, prefix, left, apart=apart)
    spread = triton.next_power_of_2(min(TILE_I, max(inputs, 8)))
    _write_kernel[(outputs, triton.cdiv(inputs, spread))](
        *source.arguments(), width, prefix, cut, bits, *bits.stride(),
        APART=apart, TILE_I=spread, num_warps=4, **source.options(),
    )  # fmt: skip


def _cut(source: "Source", width: int, prefix: Tensor, left: Tensor, *, apart: bool) -> Tensor:
    """Return how far, row by row, the ties of each group [G] stay: an index into the group."""
    outputs, inputs = source.x.shape
    windows = triton.cdiv(inputs, width)
    tile = min(TILE_I, triton.next_power_of_2(width))
    shape = {"APART": apart, "TILE_I": tile, "num_warps": 4}
    ties = torch.empty((windows, outputs), dtype=torch.int32, device=source.x.device)
    _tie_kernel[(outputs, windows)](
        *source.arguments(), width, prefix, ties, **shape, **source.options()
    )
    # Groups are rows of `ties` when they hold all rows, and its columns when they hold one.
    ties = ties.T if apart else ties
    until = ties.cumsum(1)
    stay = until[:, -1] - left
    row = (until < stay[:, None]).sum(1).clamp_(max=ties.shape[1] - 1)
    within = stay - (until - ties).gather(1, row[:, None])[:, 0]
    cut = torch.empty(len(left), dtype=torch.int64, device=source.x.device)
    _cut_kernel[(len(left),)](
        *source.arguments(), width, prefix, row, within, cut, **shape, **source.options()
    )
    return cut


@triton.jit
def _count_kernel(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse, rho, O, I,  # noqa: ARG001, E741
    x_o, x_i, out_o, out_i, dual_o, dual_i, width, prefix_ptr, counts_ptr,  # noqa: ARG001
    SHIFT: tl.constexpr, TOP: tl.constexpr, ROWS: tl.constexpr, APART: tl.constexpr,
    TILE_I: tl.constexpr, KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    steps = tl.cdiv(width, TILE_I)
    window = tl.program_id(1) // steps
    within = (tl.program_id(1) % steps).to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
    i = window.to(tl.int64) * width + within
    top = tl.program_id(0).to(tl.int64) * ROWS
    group = top if APART else window.to(tl.int64)
    prefix = tl.load(prefix_ptr + group)
    total = tl.zeros((256,), tl.int32)
    for step in range(ROWS):
        o = top + step
        score, _ = score_at(
            x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse, o, i, O, I,
            x_o, x_i, dual_o, dual_i, "", KIND, SHARES, SCALED,
        )  # fmt: skip
        key = key_of(score)
        inside = (o < O) & (i < I) & (within < width)
        byte = key >> SHIFT
        if SHIFT == TOP:
            byte += 128
        else:
            inside = inside & (byte >> 8 == prefix)
            byte = byte & 0xFF
        byte = byte.to(tl.int32)
        total += tl.histogram(byte, 256, inside)
    byte = tl.arange(0, 256)
    tl.atomic_add(counts_ptr + group * 256 + byte, total, total > 0)


@triton.jit
def _tie_kernel(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse, rho, O, I,  # noqa: ARG001, E741
    x_o, x_i, out_o, out_i, dual_o, dual_i, width, key_ptr, ties_ptr,  # noqa: ARG001
    APART: tl.constexpr, TILE_I: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64)
    window = tl.program_id(1).to(tl.int64)
    group = o if APART else window
    threshold = tl.load(key_ptr + group)
    ties = tl.zeros((TILE_I,), tl.int32)
    for start in range(0, width, TILE_I):
        within = start + tl.arange(0, TILE_I)
        i = window * width + within
        score, _ = score_at(
            x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse, o, i, O, I,
            x_o, x_i, dual_o, dual_i, "", KIND, SHARES, SCALED,
        )  # fmt: skip
        tied = (key_of(score) == threshold) & (i < I) & (within < width)
        ties += tied.to(tl.int32)
    tl.store(ties_ptr + window * O + o, tl.sum(ties, 0))


@triton.jit
def _cut_kernel(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse, rho, O, I,  # noqa: ARG001, E741
    x_o, x_i, out_o, out_i, dual_o, dual_i, width, key_ptr, cut_row_ptr, stay_ptr, cut_ptr,  # noqa: ARG001
    APART: tl.constexpr, TILE_I: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    o = group if APART else tl.load(cut_row_ptr + group)
    window = group * 0 if APART else group
    threshold = tl.load(key_ptr + group)
    stay = tl.load(stay_ptr + group).to(tl.int32)
    seen = stay * 0
    cut = stay * 0
    for start in range(0, width, TILE_I):
        within = start + tl.arange(0, TILE_I)
        i = window * width + within
        score, _ = score_at(
            x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse, o, i, O, I,
            x_o, x_i, dual_o, dual_i, "", KIND, SHARES, SCALED,
        )  # fmt: skip
        tied = (key_of(score) == threshold) & (i < I) & (within < width)
        rank = seen + tl.cumsum(tied.to(tl.int32), 0)
        # The cut is one past the last tie that stays.
        last = tl.max(tl.where(tied & (rank <= stay), within + 1, 0), 0)
        cut = tl.maximum(cut, last)
        seen += tl.sum(tied.to(tl.int32), 0)
    row = group * 0 if APART else o
    tl.store(cut_ptr + group, row * width + cut)


@triton.jit
def _write_kernel(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse, rho, O, I,  # noqa: E741
    x_o, x_i, out_o, out_i, dual_o, dual_i, width, key_ptr, cut_ptr, bits_ptr, bits_o, bits_b,
    APART: tl.constexpr, TILE_I: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_I + tl.arange(0, TILE_I)
    i = column.to(tl.int64)
    inside = i < I
    score, value = score_at(
        x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse, o, i, O, I,
        x_o, x_i, dual_o, dual_i, "", KIND, SHARES, SCALED,
    )  # fmt: skip
    key = key_of(score)
    # Divided in 32 bits, for which GPUs have fast ways.
    group = column * 0 + o if APART else column // width
    index = i if APART else o * width + column % width
    threshold = tl.load(key_ptr + group, inside, other=0)
    cut = tl.load(cut_ptr + group, inside, other=0)
    keep = ((key > threshold) | ((key == threshold) & (index < cut))) & inside
    out_spot, dual_spot = out_ptr + o * out_o + i * out_i, dual_ptr + o * dual_o + i * dual_i
    write(out_spot, dual_spot, value, keep, rho, inside, KIND)
    bit = tl.reshape(keep.to(tl.int32), (TILE_I // 8, 8)) << tl.arange(0, 8)[None, :]
    b = tl.program_id(1).to(tl.int64) * (TILE_I // 8) + tl.arange(0, TILE_I // 8)
    tl.store(bits_ptr + o * bits_o + b * bits_b, tl.sum(bit, 1).to(tl.uint8), b * 8 < I)
