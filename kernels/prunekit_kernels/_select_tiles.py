"""Selection of blocks, rows or columns by sums of scores.

One pass sums the scores of each tile, :mod:`prunekit_kernels._select_radix` finds the threshold
among the sums, and one pass zeroes the weights and packs their bits without reading a weight. Sums
are float64: sums of float32 scores within about 2¹⁵ of each other are exact, so equal tiles tie
in any order of addition.
Shapes: O output features, I input features, R rows of tiles, C tiles in such a row.
"""

from dataclasses import replace

import torch
from torch import Tensor

from prunekit_kernels import _select_radix
from prunekit_kernels._select_keys import SCORE, score_at, write
from prunekit_kernels._source import Source
from prunekit_kernels._triton import tl, triton
from prunekit_kernels.groups import Groups

TILE_I = 1024
PART = 128  # rows summed by one program; fixed, since it sets the order of summation


def launch(source: Source, groups: Groups, bits: Tensor) -> None:
    """Select, write the output of the source, and fill the packed bits.

    Args:
        source: Source of scores.
        groups: The whole matrix as one group, with tiles.
        bits: [O, B] uint8, filled.
    """
    outputs, inputs = source.x.shape
    height, width = groups.tile
    total = _sums(source, height, width)
    # Radix selection scans rows; tiles as wide as the matrix would give rows of one entry each.
    flat = inputs == width
    total = total.view(1, -1) if flat else total
    chosen = total.new_empty((len(total), -(-total.shape[1] // 8)), dtype=torch.uint8)
    scores = source._replace(
        kind=SCORE, x=total, out=total, dual=total, row=None, column=None, scale=None
    )
    _select_radix.launch(scores, replace(groups, tile=(1, 1)), chosen)
    _spread_kernel[(outputs, triton.cdiv(inputs, TILE_I))](
        *source.arguments(), chosen, chosen.stride(0), height, bits, *bits.stride(),
        FLAT=flat, WIDTH=width, TILE_I=TILE_I, num_warps=4, **source.options(),
    )  # fmt: skip


def _sums(source: Source, height: int, width: int) -> Tensor:
    """Return the sums of the tiles, float64 [R, C]."""
    outputs, inputs = source.x.shape
    down, across, parts = outputs // height, inputs // width, triton.cdiv(height, PART)
    span = min(TILE_I, triton.next_power_of_2(width))
    tiles = TILE_I // span
    partial = torch.empty((down, parts, across), dtype=torch.float64, device=source.x.device)
    _sum_kernel[(down * parts, triton.cdiv(across, tiles))](
        *source.arguments(), partial, parts, across, height, PART=PART, WIDTH=width,
        TILES=tiles, SPAN=span, num_warps=4, **source.options(),
    )  # fmt: skip
    return partial[:, 0] if parts == 1 else partial.sum(1)


@triton.jit
def _sum_kernel(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho,  # noqa: ARG001
    O, I, stride_x_o, stride_x_i, stride_out_o, stride_out_i,  # noqa: ARG001, E741
    stride_dual_o, stride_dual_i, partial_ptr, PARTS, ACROSS, HEIGHT,
    PART: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    # A program sums PART rows of neighbouring tiles; each has WIDTH columns, read in spans.
    pid = tl.program_id(0)
    part = pid % PARTS
    top = (pid // PARTS).to(tl.int64) * HEIGHT + part * PART
    tile = tl.program_id(1).to(tl.int64) * TILES + tl.arange(0, TILES)[:, None]
    lane = tl.arange(0, SPAN)[None, :]
    total = tl.zeros((TILES, SPAN), tl.float64)
    for step in tl.range(0, tl.minimum(PART, HEIGHT - part * PART)):  # pyright: ignore
        for start in tl.range(0, WIDTH, SPAN):  # pyright: ignore
            i = tile * WIDTH + start + lane
            score, _ = score_at(
                x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, top + step, i, O, I,
                stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "", KIND, SHARES, SCALED,
            )  # fmt: skip
            score = tl.where(score == score, score, float("-inf"))  # noqa: PLR0124
            total += tl.where(start + lane < WIDTH, score, 0.0).to(tl.float64)
    tile = tl.program_id(1).to(tl.int64) * TILES + tl.arange(0, TILES)
    ptrs = partial_ptr + pid.to(tl.int64) * ACROSS + tile
    tl.store(ptrs, tl.sum(total, 1), tile < ACROSS)


@triton.jit
def _spread_kernel(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho, O, I,  # noqa: E741
    stride_x_o, stride_x_i, stride_out_o, stride_out_i, stride_dual_o, stride_dual_i,
    chosen_ptr, stride_chosen_o, HEIGHT, bits_ptr, stride_bits_o, stride_bits_b,
    FLAT: tl.constexpr, WIDTH: tl.constexpr, TILE_I: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * TILE_I + tl.arange(0, TILE_I)
    inside = column < I
    # Integer division in 32 bits, which GPUs do faster than in 64.
    down, tile = row // HEIGHT, column // WIDTH
    if FLAT:
        tile += down
        down = 0
    o, i = row.to(tl.int64), column.to(tl.int64)
    ptrs = chosen_ptr + down * stride_chosen_o + tile // 8
    byte = tl.load(ptrs, inside, other=0).to(tl.int32)  # [TILE_I]
    keep = ((byte >> tile % 8) & 1 != 0) & inside
    out_ptrs = out_ptr + o * stride_out_o + i * stride_out_i
    dual_ptrs = dual_ptr + o * stride_dual_o + i * stride_dual_i
    if KIND == 1:
        # Kept weights are already in place.
        zero = tl.zeros((TILE_I,), out_ptr.dtype.element_ty)
        tl.store(out_ptrs, zero, inside & (keep == 0))
    if KIND == 2:
        _, value = score_at(
            x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, i, O, I,
            stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "", KIND, SHARES, SCALED,
        )  # fmt: skip
        write(out_ptrs, dual_ptrs, value, keep, rho, inside, KIND)
    bit = tl.reshape(keep.to(tl.int32), (TILE_I // 8, 8)) << tl.arange(0, 8)[None, :]
    b = tl.program_id(1).to(tl.int64) * (TILE_I // 8) + tl.arange(0, TILE_I // 8)
    bits_ptrs = bits_ptr + o * stride_bits_o + b * stride_bits_b
    tl.store(bits_ptrs, tl.sum(bit, 1).to(tl.uint8), b * 8 < I)
