"""Radix selection of thresholds for groups that span many programs.

Keys have four bytes; those of float64 scores have eight. Each pass counts, among the keys that
agree with the known prefix of the threshold, how often each next byte occurs; the byte in which
the count to prune is reached extends the prefix. Counts are integers, so atomic additions are
deterministic. Ties are cut at an index: another pass counts them row by row, and the row that
contains the cut is read once more. The last pass writes.
Shapes: O output features, I input features, G groups, P programs.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from prunekit_kernels._select_keys import key_of, score_at, write
from prunekit_kernels._source import Source
from prunekit_kernels._triton import tl, triton
from prunekit_kernels.groups import Groups

TILE_I = 1024
ROWS = 16  # rows of one group that a program counts


def launch(source: Source, groups: Groups, bits: Tensor) -> None:
    """Select, write the output of the source, and fill the packed bits.

    Args:
        source: Source of scores.
        groups: The groups; of single rows or of all rows, without tiles.
        bits: [O, B] uint8, filled.
    """
    outputs, inputs = source.x.shape
    width = min(groups.columns or inputs, inputs)
    windows = triton.cdiv(inputs, width)
    single_rows = groups.rows == 1
    device = source.x.device
    # Keys still to prune in each group, among those that agree with the prefix.
    to_prune = _on_device(groups.pruned, device)
    to_prune = to_prune.expand(outputs) if single_rows else to_prune
    size = 8 if source.x.dtype == torch.float64 else 4
    key_dtype = torch.int64 if size == 8 else torch.int32
    prefix = torch.zeros(len(to_prune), dtype=key_dtype, device=device)
    rows = 1 if single_rows or outputs == 1 else ROWS
    tile = min(TILE_I, triton.next_power_of_2(width))
    grid = (triton.cdiv(outputs, rows), windows * triton.cdiv(width, tile))
    shape = {"SINGLE_ROWS": single_rows, "TILE_I": tile, "num_warps": 4}
    for shift in range(8 * size - 8, -1, -8):
        counts = torch.zeros((len(to_prune), 256), dtype=torch.int32, device=device)
        _count_kernel[grid](
            *source.arguments(), width, prefix, counts, SHIFT=shift, TOP=8 * size - 8,
            ROWS=rows, **shape, **source.options(),
        )  # fmt: skip
        cumulative = counts.cumsum(1)
        byte = (cumulative < to_prune[:, None]).sum(1).clamp_(max=255)
        to_prune = to_prune - (cumulative - counts).gather(1, byte[:, None])[:, 0]
        # The highest byte of a key is signed.
        byte = byte.to(key_dtype)
        prefix = byte - 128 if shift == 8 * size - 8 else prefix << 8 | byte
    cut = _cut(source, width, prefix, to_prune, single_rows=single_rows)
    tile_write = triton.next_power_of_2(min(TILE_I, max(inputs, 8)))
    _write_kernel[(outputs, triton.cdiv(inputs, tile_write))](
        *source.arguments(), width, prefix, cut, bits, *bits.stride(),
        SINGLE_ROWS=single_rows, TILE_I=tile_write, num_warps=warps_without_copies(tile_write),
        **source.options(),
    )  # fmt: skip


def warps_without_copies(entries: int) -> int:
    """Return as many warps, at most 4, as have entries of their own.

    Warps that repeat the work of others would read weights that those have written already.
    """
    return max(1, min(4, entries // 32))


def _on_device(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return the counts, at least 0, as int64.

    Runs of equal counts are filled in: a copy from main memory would make the host wait.
    """
    found, start = torch.empty(len(counts), dtype=torch.int64, device=device), 0
    for count, run in groupby(counts):
        end = start + len([*run])
        found[start:end] = max(count, 0)
        start = end
    return found


def _cut(
    source: Source, width: int, prefix: Tensor, to_prune: Tensor, *, single_rows: bool
) -> Tensor:
    """Return the index in each group before which ties are kept."""
    outputs, inputs = source.x.shape
    windows = triton.cdiv(inputs, width)
    tile = min(TILE_I, triton.next_power_of_2(width))
    shape = {"SINGLE_ROWS": single_rows, "TILE_I": tile, "num_warps": 4}
    ties = torch.empty((windows, outputs), dtype=torch.int32, device=source.x.device)
    _tie_kernel[(outputs, windows)](
        *source.arguments(), width, prefix, ties, **shape, **source.options()
    )
    # Groups are rows of `ties` when they hold all rows, and its columns when they hold one.
    ties = ties.T if single_rows else ties
    cumulative = ties.cumsum(1)
    kept = cumulative[:, -1] - to_prune
    row = (cumulative < kept[:, None]).sum(1).clamp_(max=ties.shape[1] - 1)
    within = kept - (cumulative - ties).gather(1, row[:, None])[:, 0]
    cut = torch.empty(len(to_prune), dtype=torch.int64, device=source.x.device)
    _cut_kernel[(len(to_prune),)](
        *source.arguments(), width, prefix, row, within, cut, **shape, **source.options()
    )
    return cut


@triton.jit
def _count_kernel(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho,  # noqa: ARG001
    O, I, stride_x_o, stride_x_i, stride_out_o, stride_out_i,  # noqa: ARG001, E741
    stride_dual_o, stride_dual_i, WIDTH, prefix_ptr, counts_ptr,
    SHIFT: tl.constexpr, TOP: tl.constexpr, ROWS: tl.constexpr, SINGLE_ROWS: tl.constexpr,
    TILE_I: tl.constexpr, KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    steps = tl.cdiv(WIDTH, TILE_I)
    window = tl.program_id(1) // steps
    within = (tl.program_id(1) % steps).to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
    i = window.to(tl.int64) * WIDTH + within
    top = tl.program_id(0).to(tl.int64) * ROWS
    group = top if SINGLE_ROWS else window.to(tl.int64)
    prefix = tl.load(prefix_ptr + group)
    total = tl.zeros((256,), tl.int32)
    for step in range(ROWS):
        o = top + step
        score, _ = score_at(
            x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, i, O, I,
            stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "", KIND, SHARES, SCALED,
        )  # fmt: skip
        key = key_of(score)
        inside = (o < O) & (i < I) & (within < WIDTH)
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
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho,  # noqa: ARG001
    O, I, stride_x_o, stride_x_i, stride_out_o, stride_out_i,  # noqa: ARG001, E741
    stride_dual_o, stride_dual_i, WIDTH, threshold_ptr, ties_ptr,
    SINGLE_ROWS: tl.constexpr, TILE_I: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64)
    window = tl.program_id(1).to(tl.int64)
    group = o if SINGLE_ROWS else window
    threshold = tl.load(threshold_ptr + group)
    ties = tl.zeros((TILE_I,), tl.int32)
    for start in range(0, WIDTH, TILE_I):
        within = start + tl.arange(0, TILE_I)
        i = window * WIDTH + within
        score, _ = score_at(
            x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, i, O, I,
            stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "", KIND, SHARES, SCALED,
        )  # fmt: skip
        tied = (key_of(score) == threshold) & (i < I) & (within < WIDTH)
        ties += tied.to(tl.int32)
    tl.store(ties_ptr + window * O + o, tl.sum(ties, 0))


@triton.jit
def _cut_kernel(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho,  # noqa: ARG001
    O, I, stride_x_o, stride_x_i, stride_out_o, stride_out_i,  # noqa: ARG001, E741
    stride_dual_o, stride_dual_i, WIDTH, threshold_ptr, cut_row_ptr, kept_ptr, cut_ptr,
    SINGLE_ROWS: tl.constexpr, TILE_I: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    o = group if SINGLE_ROWS else tl.load(cut_row_ptr + group)
    window = group * 0 if SINGLE_ROWS else group
    threshold = tl.load(threshold_ptr + group)
    kept = tl.load(kept_ptr + group).to(tl.int32)
    seen = kept * 0
    cut = kept * 0
    for start in range(0, WIDTH, TILE_I):
        within = start + tl.arange(0, TILE_I)
        i = window * WIDTH + within
        score, _ = score_at(
            x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, i, O, I,
            stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "", KIND, SHARES, SCALED,
        )  # fmt: skip
        tied = (key_of(score) == threshold) & (i < I) & (within < WIDTH)
        rank = seen + tl.cumsum(tied.to(tl.int32), 0)
        # The cut is one past the last tie that is kept.
        last = tl.max(tl.where(tied & (rank <= kept), within + 1, 0), 0)
        cut = tl.maximum(cut, last)
        seen += tl.sum(tied.to(tl.int32), 0)
    row = group * 0 if SINGLE_ROWS else o
    tl.store(cut_ptr + group, row * WIDTH + cut)


@triton.jit
def _write_kernel(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho, O, I,  # noqa: E741
    stride_x_o, stride_x_i, stride_out_o, stride_out_i, stride_dual_o, stride_dual_i,
    WIDTH, threshold_ptr, cut_ptr, bits_ptr, stride_bits_o, stride_bits_b,
    SINGLE_ROWS: tl.constexpr, TILE_I: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_I + tl.arange(0, TILE_I)
    i = column.to(tl.int64)
    inside = i < I
    score, value = score_at(
        x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, i, O, I,
        stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "", KIND, SHARES, SCALED,
    )  # fmt: skip
    key = key_of(score)
    # Integer division in 32 bits, which GPUs do faster than in 64.
    group = column * 0 + o if SINGLE_ROWS else column // WIDTH
    index = i if SINGLE_ROWS else o * WIDTH + column % WIDTH
    threshold = tl.load(threshold_ptr + group, inside, other=0)
    cut = tl.load(cut_ptr + group, inside, other=0)
    keep = ((key > threshold) | ((key == threshold) & (index < cut))) & inside
    out_ptrs = out_ptr + o * stride_out_o + i * stride_out_i
    dual_ptrs = dual_ptr + o * stride_dual_o + i * stride_dual_i
    write(out_ptrs, dual_ptrs, value, keep, rho, inside, KIND)
    bit = tl.reshape(keep.to(tl.int32), (TILE_I // 8, 8)) << tl.arange(0, 8)[None, :]
    b = tl.program_id(1).to(tl.int64) * (TILE_I // 8) + tl.arange(0, TILE_I // 8)
    bits_ptrs = bits_ptr + o * stride_bits_o + b * stride_bits_b
    tl.store(bits_ptrs, tl.sum(bit, 1).to(tl.uint8), b * 8 < I)
