"""2:4 compression: two of every four neighbours, and one bit per weight.

    values[o, 2g], values[o, 2g + 1] = the two kept of w[o, 4g : 4g + 4], in column order
    bit i of keep = 1 where column i is kept, eight columns a byte, the lowest column lowest

Half of the values and one bit per weight: 0.5625 of the bytes of a dense 16-bit matrix. The layout,
and the zeros that fill groups with fewer than two non-zeros, are those of compressed-tensors'
``sparse-24-bitmask``, so its files are read and written exactly.
Shapes: O output features, I input features (a multiple of 4), H = I / 2, B = ⌈I / 8⌉ bytes.
"""

from typing import NamedTuple

import torch
from jaxtyping import Num, UInt8
from torch import Tensor

from prunekit_kernels._triton import runs_triton, tl, triton
from prunekit_kernels.packed_mask import unpack

TILE_O, TILE_I = 8, 256
# Nibble of a group's non-zeros → nibble of its stored columns. Two non-zeros are stored as such;
# for fewer, the zeros stored with them are those that compressed-tensors chooses. 0: more than two.
_STORED = (12, 5, 10, 3, 12, 5, 6, 0, 12, 9, 10, 0, 12, 0, 0, 0)


class Sparse24(NamedTuple):
    """A compressed matrix."""

    values: Num[Tensor, "O H"]
    keep: UInt8[Tensor, "O B"]


def compress24(weight: Num[Tensor, "O I"]) -> Sparse24:
    """Compress a 2:4 matrix; −0 counts as zero.

    Raises:
        ValueError: I is no multiple of 4, or a group has more than two non-zeros.
    """
    if weight.shape[1] % 4:
        raise ValueError(f"2:4 needs a multiple of 4 inputs, got {weight.shape[1]}")
    places = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=weight.device)
    groups = (weight != 0).unflatten(1, (-1, 4))
    found = (groups * places).sum(2, dtype=torch.uint8)
    table = torch.tensor(_STORED, dtype=torch.uint8, device=weight.device)
    stored = table.index_select(0, found.flatten().int()).view(found.shape)
    if broken := int((stored == 0).sum()):
        raise ValueError(
            f"{broken} of {stored.numel()} groups of four have more than two non-zeros"
        )
    keep = (stored[..., None] & places) != 0
    values = weight[keep.flatten(1)].view(len(weight), weight.shape[1] // 2)
    low, high = (
        torch.nn.functional.pad(stored, (0, stored.shape[1] % 2)).unflatten(1, (-1, 2)).unbind(2)
    )
    return Sparse24(values, low | high << 4)


def expand24(values: Num[Tensor, "O H"], keep: UInt8[Tensor, "O B"]) -> Num[Tensor, "O I"]:
    """Return the dense matrix that :func:`compress24` compressed.

    Raises:
        ValueError: The shapes, types or devices of ``values`` and ``keep`` do not match.
    """
    check24(values, keep)
    return _expand24(values, keep)


def check24(values: Tensor, keep: Tensor) -> None:
    """Check that ``values`` and ``keep`` belong to one compressed matrix.

    Raises:
        ValueError: Shapes, types or devices do not match.
    """
    outputs, half = values.shape
    if half % 2 or keep.shape != (outputs, -(-half // 4)) or keep.dtype != torch.uint8:
        raise ValueError(
            f"values of shape {tuple(values.shape)} need keep bits of shape "
            f"{(outputs, -(-half // 4))} in uint8, got {tuple(keep.shape)} in {keep.dtype}"
        )
    if values.device != keep.device:
        raise ValueError(f"values are on {values.device}, keep bits on {keep.device}")


def count_broken24(keep: UInt8[Tensor, "O B"], inputs: int) -> int:
    """Return the number of groups of four without exactly two kept.

    Args:
        keep: Packed bits, on any device.
        inputs: Columns I, a multiple of 4; bits beyond them are ignored.
    """
    whole, half = keep[:, : inputs // 8], keep[:, inputs // 8 :]
    found = torch.bincount(whole.flatten(), minlength=256)
    # A last half byte is completed by a group with two kept.
    found += torch.bincount((half & 0x0F | 0x30).flatten(), minlength=256)
    broken = [sum(nibble.bit_count() != 2 for nibble in divmod(byte, 16)) for byte in range(256)]
    return int((found * torch.tensor(broken, device=keep.device)).sum())


def expand24_reference(values: Tensor, keep: Tensor) -> Tensor:
    """Return the dense matrix in plain PyTorch."""
    mask = unpack(keep, 2 * values.shape[1])
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter_(
        mask, values
    )


@torch.library.custom_op("prunekit::expand24", mutates_args=())
def _expand24(values: Tensor, keep: Tensor) -> Tensor:
    if not runs_triton(values):
        return expand24_reference(values, keep)
    outputs, half = values.shape
    out = torch.empty(outputs, 2 * half, dtype=values.dtype, device=values.device)
    if out.numel():
        _launch(values, keep, out)
    return out


@_expand24.register_fake
def _(values: Tensor, keep: Tensor) -> Tensor:  # noqa: ARG001
    return values.new_empty(len(values), 2 * values.shape[1])


def _launch(values: Tensor, keep: Tensor, out: Tensor) -> None:
    outputs, inputs = out.shape
    grid = (triton.cdiv(outputs, TILE_O), triton.cdiv(inputs, TILE_I))
    with torch.cuda.device_of(values):
        _kernel[grid](
            values, keep, out, outputs, inputs, *values.stride(), *keep.stride(), *out.stride(),
            TILE_O=TILE_O, TILE_I=TILE_I, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def load24(
    values_ptr, keep_ptr, o, O, group, G,  # noqa: E741
    stride_values_o, stride_values_h, stride_keep_o, stride_keep_b,
    TILE_O: tl.constexpr, TILE_G: tl.constexpr,
):  # fmt: skip
    """Load groups ``group`` to ``group + TILE_G`` of rows ``o`` as four planes.

    Plane j [TILE_O, TILE_G] holds column j of each group of four; ``group`` is even.
    """
    inside = (o < O)[:, None]
    h = 2 * group + tl.arange(0, 2 * TILE_G)
    ptrs = values_ptr + o[:, None] * stride_values_o + h[None, :].to(tl.int64) * stride_values_h
    pairs = tl.load(ptrs, inside & (h < 2 * G)[None, :], other=0.0)  # [TILE_O, 2 * TILE_G]
    first, second = tl.split(tl.reshape(pairs, (TILE_O, TILE_G, 2)))
    b = group // 2 + tl.arange(0, TILE_G // 2)
    ptrs = keep_ptr + o[:, None] * stride_keep_o + b[None, :].to(tl.int64) * stride_keep_b
    bits = tl.load(ptrs, inside & (2 * b < G)[None, :], other=0).to(tl.int32)
    bits = tl.reshape(tl.join(bits & 15, bits >> 4), (TILE_O, TILE_G))
    # Two of four are kept, so column 0 can only hold the first, column 3 only the second.
    zero = tl.zeros_like(first)
    is0, is1, is2, is3 = (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0
    w0 = tl.where(is0, first, zero)
    w1 = tl.where(is1, tl.where(is0, second, first), zero)
    w2 = tl.where(is2, tl.where(is3, first, second), zero)
    w3 = tl.where(is3, second, zero)
    return w0, w1, w2, w3


@triton.jit
def interleave(w0, w1, w2, w3, TILE_O: tl.constexpr, TILE_G: tl.constexpr):
    """Return four planes as consecutive columns [TILE_O, 4 * TILE_G]."""
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (TILE_O, 4 * TILE_G))


@triton.jit
def _kernel(
    values_ptr, keep_ptr, out_ptr, O, I,  # noqa: E741
    stride_values_o, stride_values_h, stride_keep_o, stride_keep_b, stride_out_o, stride_out_i,
    TILE_O: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    TILE_G: tl.constexpr = TILE_I // 4
    o = tl.program_id(0).to(tl.int64) * TILE_O + tl.arange(0, TILE_O)
    w0, w1, w2, w3 = load24(
        values_ptr, keep_ptr, o, O, tl.program_id(1) * TILE_G, I // 4,
        stride_values_o, stride_values_h, stride_keep_o, stride_keep_b, TILE_O, TILE_G,
    )  # fmt: skip
    weight = interleave(w0, w1, w2, w3, TILE_O, TILE_G)
    i = tl.program_id(1).to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
    ptrs = out_ptr + o[:, None] * stride_out_o + i[None, :] * stride_out_i
    tl.store(ptrs, weight, (o < O)[:, None] & (i < I)[None, :])
