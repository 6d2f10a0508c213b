"""Bitmask compression: kept weights row by row, and one bit per weight.

    values[row_offsets[o] : …] = the kept of w[o, :], in column order
    bit i of keep = 1 where column i is kept, eight columns a byte, the lowest column lowest

Any mask can be stored, in 1 − s + 1/16 of the bytes of a dense 16-bit matrix at sparsity s. The
layout is that of compressed-tensors' ``sparse-bitmask``, so its files are read and written exactly.
Shapes: O output features, I input features, K kept weights, B = ⌈I / 8⌉ bytes.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int64, Num, UInt8
from torch import Tensor

from prunekit_kernels._triton import runs_triton, tl, triton
from prunekit_kernels.packed_mask import pack, unpack

TILE_B = 32  # bytes of keep bits per step


class Bitmask(NamedTuple):
    """A compressed matrix."""

    values: Num[Tensor, " K"]
    keep: UInt8[Tensor, "O B"]
    row_offsets: Int64[Tensor, " O"]


def compress_bitmask(weight: Num[Tensor, "O I"]) -> Bitmask:
    """Compress the non-zero entries of a matrix; −0 counts as zero."""
    keep = weight != 0
    counts = keep.sum(1)
    return Bitmask(weight[keep], pack(keep), counts.cumsum(0) - counts)


def expand_bitmask(compressed: Bitmask, inputs: int) -> Num[Tensor, "O I"]:
    """Return the dense matrix of ``inputs`` columns.

    Raises:
        ValueError: The shapes, types or devices of the parts do not match.
    """
    check_bitmask(compressed, inputs)
    return _expand_bitmask(*compressed, inputs)


def check_bitmask(compressed: Bitmask, inputs: int) -> None:
    """Check that the parts belong to one compressed matrix.

    Raises:
        ValueError: Shapes, types or devices do not match.
    """
    values, keep, row_offsets = compressed
    expected = (len(row_offsets), -(-inputs // 8))
    if keep.shape != expected or keep.dtype != torch.uint8 or row_offsets.dtype != torch.int64:
        raise ValueError(
            f"{len(row_offsets)} rows of {inputs} inputs need int64 row offsets and keep bits of "
            f"shape {expected} in uint8, got {row_offsets.dtype} and {tuple(keep.shape)} in "
            f"{keep.dtype}"
        )
    if not values.device == keep.device == row_offsets.device:
        raise ValueError(
            f"values, keep bits and row offsets are on {values.device}, {keep.device}, "
            f"{row_offsets.device}"
        )


def expand_bitmask_reference(values: Tensor, keep: Tensor, inputs: int) -> Tensor:
    """Return the dense matrix in plain PyTorch.

    Args:
        values: Kept weights [K].
        keep: Packed bits [O, B].
        inputs: Columns I.
    """
    mask = unpack(keep, inputs)
    out = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return out.masked_scatter_(mask, values)


@torch.library.custom_op("prunekit::expand_bitmask", mutates_args=())
def _expand_bitmask(values: Tensor, keep: Tensor, row_offsets: Tensor, inputs: int) -> Tensor:
    if not runs_triton(values):
        return expand_bitmask_reference(values, keep, inputs)
    out = torch.empty(len(keep), inputs, dtype=values.dtype, device=values.device)
    if out.numel():
        _launch(values, keep, row_offsets, out)
    return out


@_expand_bitmask.register_fake
def _(values: Tensor, keep: Tensor, row_offsets: Tensor, inputs: int) -> Tensor:  # noqa: ARG001
    return values.new_empty(len(keep), inputs)


def _launch(values: Tensor, keep: Tensor, row_offsets: Tensor, out: Tensor) -> None:
    outputs, inputs = out.shape
    with torch.cuda.device_of(values):
        _kernel[(triton.cdiv(outputs, 4),)](
            values, keep, row_offsets, out, len(values), outputs, inputs,
            *keep.stride(), *out.stride(),
            TILE_O=4, TILE_B=TILE_B, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def ones(bits):
    """Count the set bits in the lowest byte of each int32."""
    bits = bits - ((bits >> 1) & 0x55)
    bits = (bits & 0x33) + ((bits >> 2) & 0x33)
    return (bits + (bits >> 4)) & 0x0F


@triton.jit
def load_offsets(offsets_ptr, o, O, K):  # noqa: E741
    """Load the first index of rows ``o``, limited to 0..K."""
    offset = tl.load(offsets_ptr + o, o < O, other=0)
    return tl.minimum(tl.maximum(offset, 0), K)


@triton.jit
def load_bitmask(
    values_ptr, keep_ptr, offset, K, o, O, start, I, stride_keep_o, stride_keep_b,  # noqa: E741
    TILE_O: tl.constexpr, TILE_B: tl.constexpr,
):  # fmt: skip
    """Load columns ``8 * start`` and on of rows ``o``.

    ``offset`` [TILE_O], at least 0, is the index of the first kept weight of these columns in each
    row. Nothing is read beyond the K values, for any bits and offsets: columns of a row whose
    weights would end there are 0. Returns the weights [TILE_O, 8 * TILE_B] and the offsets of the
    next columns.
    """
    byte = start + tl.arange(0, TILE_B)
    ptrs = keep_ptr + o[:, None] * stride_keep_o + byte[None, :].to(tl.int64) * stride_keep_b
    inside = (o < O)[:, None] & (8 * byte < I)[None, :]
    bits = tl.load(ptrs, inside, other=0).to(tl.int32)  # [TILE_O, TILE_B]
    counts = ones(bits)
    before = tl.cumsum(counts, 1) - counts  # kept in earlier bytes
    bit = tl.arange(0, 8)[None, None, :]
    within = ones(bits[:, :, None] & ((1 << bit) - 1))  # kept in earlier bits
    total = tl.sum(counts, 1).to(tl.int64)
    # Checked by row: a check of each weight took up to 20 more registers.
    held = (offset + total <= K)[:, None, None]
    keep = (((bits[:, :, None] >> bit) & 1) != 0) & held
    index = offset[:, None, None] + (before[:, :, None] + within).to(tl.int64)
    weight = tl.load(values_ptr + index, keep, other=0.0)  # [TILE_O, TILE_B, 8]
    return tl.reshape(weight, (TILE_O, 8 * TILE_B)), offset + total


@triton.jit
def _kernel(
    values_ptr, keep_ptr, offsets_ptr, out_ptr, K, O, I,  # noqa: E741
    stride_keep_o, stride_keep_b, stride_out_o, stride_out_i,
    TILE_O: tl.constexpr, TILE_B: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * TILE_O + tl.arange(0, TILE_O)
    offset = load_offsets(offsets_ptr, o, O, K)
    for start in tl.range(0, (I + 7) // 8, TILE_B):  # pyright: ignore
        weight, offset = load_bitmask(
            values_ptr, keep_ptr, offset, K, o, O, start, I,
            stride_keep_o, stride_keep_b, TILE_O, TILE_B,
        )  # fmt: skip
        i = 8 * start + tl.arange(0, 8 * TILE_B)
        ptrs = out_ptr + o[:, None] * stride_out_o + i[None, :].to(tl.int64) * stride_out_i
        tl.store(ptrs, weight, (o < O)[:, None] & (i < I)[None, :])
