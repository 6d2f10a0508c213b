"""Triton kernels of selection; scores are computed where they are compared.

No score is ever stored. Three kernels select and write in one pass. Thresholds that no single
program can see come from :mod:`prunekit_kernels._select_radix`, selection of blocks, rows and
columns from :mod:`prunekit_kernels._select_tiles`. Scores become integer keys of the same order;
NaN gets the key of −inf.
Shapes: O output features, I input features, B = ⌈I / 8⌉ bytes.
"""

import math

import torch
from torch import Tensor

from prunekit_kernels import _select_radix, _select_tiles
from prunekit_kernels._select_keys import key_of, score_at, write
from prunekit_kernels._select_row_kernel import row_kernel
from prunekit_kernels._source import Source
from prunekit_kernels._triton import tl, triton
from prunekit_kernels.groups import Groups

LONGEST_ROW = 32768  # that one program holds in registers
TILE_O, TILE_I = 4, 512  # of the n:m kernels


def launch(source: Source, groups: Groups) -> Tensor:
    """Select, write the source's output, and return the packed bits."""
    outputs, inputs = source.x.shape
    bits = torch.empty((outputs, -(-inputs // 8)), dtype=torch.uint8, device=source.x.device)
    if not bits.numel():
        return bits
    with torch.cuda.device_of(source.x):
        if groups.tile != (1, 1):
            _select_tiles.launch(source, groups, bits)
        elif groups.rows == 1 and groups.columns is not None:
            _neighbours(source, groups.columns - groups.pruned[0], groups.columns, bits)
        elif spans_programs(source.x, groups):
            _select_radix.launch(source, groups, bits)
        else:
            _rows(source, groups.pruned[0], bits)
    return bits


def spans_programs(x: Tensor, groups: Groups) -> bool:
    """Return whether groups span several programs and have no tiles."""
    if groups.tile != (1, 1):
        return False
    return groups.rows is None or (groups.columns is None and x.shape[1] > LONGEST_ROW)


def _rows(source: Source, pruned: int, bits: Tensor) -> None:
    outputs, inputs = source.x.shape
    tile = max(128, triton.next_power_of_2(inputs))
    pruned = max(0, min(pruned, inputs))
    row_kernel[(outputs,)](
        *source.arguments(), bits, *bits.stride(), pruned, TILE_I=tile, PIECE=min(tile, 4096),
        FULL=inputs == tile, num_warps=4 if tile <= 4096 else 8 if tile <= 8192 else 16,
        **source.options(),
    )  # fmt: skip


def _neighbours(source: Source, n: int, m: int, bits: Tensor) -> None:
    outputs, inputs = source.x.shape
    if m in (2, 4, 8):
        grid = (triton.cdiv(outputs, TILE_O), triton.cdiv(inputs, TILE_I))
        _planes_kernel[grid](
            *source.arguments(), bits, *bits.stride(), N=n, M=m, TILE_O=TILE_O, TILE_I=TILE_I,
            FULL=outputs % TILE_O == 0 and inputs % TILE_I == 0, num_warps=4, **source.options(),
        )  # fmt: skip
        return
    # Each program owns whole groups and whole bytes.
    span = TILE_I // math.lcm(m, 8) * math.lcm(m, 8)
    grid = (outputs, triton.cdiv(inputs, span))
    _neighbours_kernel[grid](
        *source.arguments(), bits, *bits.stride(), N=n, M=m, SPAN=span, TILE_I=TILE_I,
        num_warps=4, **source.options(),
    )  # fmt: skip


@triton.jit
def _split2(x, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    return tl.split(tl.reshape(x, (ROWS, GROUPS, 2)))


@triton.jit
def _split4(x, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, (ROWS, GROUPS, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _split8(x, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, (ROWS, GROUPS, 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _kept(planes, I: tl.constexpr, N: tl.constexpr, M: tl.constexpr):  # noqa: E741
    """Return 1 where fewer than N of a group beat plane I."""
    beaten = tl.zeros(planes[0].shape, tl.int32)
    for j in tl.static_range(M):  # pyright: ignore
        if j < I:
            beaten += (planes[j] >= planes[I]).to(tl.int32)
        if j > I:
            beaten += (planes[j] > planes[I]).to(tl.int32)
    return (beaten < N).to(tl.int32)


@triton.jit
def _planes_kernel(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho, O, I,  # noqa: E741
    stride_x_o, stride_x_i, stride_out_o, stride_out_i, stride_dual_o, stride_dual_i,
    bits_ptr, stride_bits_o, stride_bits_b,
    N: tl.constexpr, M: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
    FULL: tl.constexpr, KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    # Each thread holds at least 8 neighbours, so splitting them into planes and joining them again
    # only renames registers.
    o = tl.program_id(0).to(tl.int64) * TILE_O + tl.arange(0, TILE_O)[:, None]
    i = tl.program_id(1).to(tl.int64) * TILE_I + tl.arange(0, TILE_I)[None, :]
    inside = (o < O) & (i < I)
    score, value = score_at(
        x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, i, O, I,
        stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "", KIND, SHARES, SCALED, FULL,
    )  # fmt: skip
    key = key_of(score)
    if not FULL:
        key = tl.where(inside, key, -0x7FFFFFFF)
    if M == 2:
        k = _split2(key, TILE_O, TILE_I // 2)
        keep = tl.join(_kept(k, 0, N, M), _kept(k, 1, N, M))
    elif M == 4:
        k = _split4(key, TILE_O, TILE_I // 4)
        even = tl.join(_kept(k, 0, N, M), _kept(k, 2, N, M))
        odd = tl.join(_kept(k, 1, N, M), _kept(k, 3, N, M))
        keep = tl.join(even, odd)
    else:
        k = _split8(key, TILE_O, TILE_I // 8)
        k04 = tl.join(_kept(k, 0, N, M), _kept(k, 4, N, M))
        k26 = tl.join(_kept(k, 2, N, M), _kept(k, 6, N, M))
        k15 = tl.join(_kept(k, 1, N, M), _kept(k, 5, N, M))
        k37 = tl.join(_kept(k, 3, N, M), _kept(k, 7, N, M))
        keep = tl.join(tl.join(k04, k26), tl.join(k15, k37))
    keep = tl.reshape(keep, (TILE_O, TILE_I))
    if not FULL:
        keep = tl.where(inside, keep, 0)
    out_ptrs = out_ptr + o * stride_out_o + i * stride_out_i
    dual_ptrs = dual_ptr + o * stride_dual_o + i * stride_dual_i
    write(out_ptrs, dual_ptrs, value, keep != 0, rho, inside, KIND, FULL)
    b0, b1, b2, b3, b4, b5, b6, b7 = _split8(keep, TILE_O, TILE_I // 8)
    low = b0 | (b1 << 1) | (b2 << 2) | (b3 << 3)
    high = (b4 << 4) | (b5 << 5) | (b6 << 6) | (b7 << 7)
    b = tl.program_id(1).to(tl.int64) * (TILE_I // 8) + tl.arange(0, TILE_I // 8)[None, :]
    ptrs = bits_ptr + o * stride_bits_o + b * stride_bits_b
    tl.store(ptrs, (low | high).to(tl.uint8), (o < O) & (b * 8 < I))


@triton.jit
def _neighbours_kernel(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho, O, I,  # noqa: E741
    stride_x_o, stride_x_i, stride_out_o, stride_out_i, stride_dual_o, stride_dual_i,
    bits_ptr, stride_bits_o, stride_bits_b,
    N: tl.constexpr, M: tl.constexpr, SPAN: tl.constexpr, TILE_I: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    # Any m: each weight reads its group again, from the L1 cache, and counts the higher ones.
    o = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE_I)
    i = tl.program_id(1).to(tl.int64) * SPAN + lane
    inside = (lane < SPAN) & (i < I)
    score, value = score_at(
        x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, i, O, I,
        stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "", KIND, SHARES, SCALED,
    )  # fmt: skip
    key = key_of(score)
    first = i // M * M
    beaten = tl.zeros((TILE_I,), tl.int32)
    for step in tl.range(M):  # pyright: ignore
        j = first + step
        rival, _ = score_at(
            x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, j, O, I,
            stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "", KIND, SHARES, SCALED,
        )  # fmt: skip
        rival = key_of(rival)
        beaten += ((rival > key) | ((rival == key) & (j < i))).to(tl.int32)
    keep = (beaten < N) & inside
    # No warp may write before all have read.
    tl.debug_barrier()
    out_ptrs = out_ptr + o * stride_out_o + i * stride_out_i
    dual_ptrs = dual_ptr + o * stride_dual_o + i * stride_dual_i
    write(out_ptrs, dual_ptrs, value, keep, rho, inside, KIND)
    bit = tl.reshape(keep.to(tl.int32), (TILE_I // 8, 8)) << tl.arange(0, 8)[None, :]
    byte = tl.arange(0, TILE_I // 8)
    b = tl.program_id(1).to(tl.int64) * (SPAN // 8) + byte
    inside = (byte < SPAN // 8) & (b * 8 < I)
    tl.store(bits_ptr + o * stride_bits_o + b * stride_bits_b, tl.sum(bit, 1).to(tl.uint8), inside)
