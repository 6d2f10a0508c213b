"""Packed mask: one bit per weight, eight neighbours a byte.

    bits[o, b] = Σⱼ keep[o, 8b + j] · 2ʲ,  j = 0..7

The layout of compressed-tensors' bitmasks: the first neighbour is the lowest bit. Bits past the
last column are 0.
Shapes: O output features, I input features, B = ⌈I / 8⌉ bytes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from prunekit_kernels._triton import runs_triton, tl, triton

TILE_O = 4
TILE_I = 512
CACHED = 1 << 18  # entries unpacked at once on a CPU
# Multiplying by this gathers the eight bytes of a word, each 0 or 1, as bits of its highest byte.
GATHER = sum(1 << (56 - 7 * byte) for byte in range(8))

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype by size in bytes."""


def pack(keep: Bool[Tensor, "O I"]) -> UInt8[Tensor, "O B"]:
    """Return the packed bits of a keep mask."""
    if keep.is_cpu:
        return torch.from_numpy(np.packbits(keep.numpy(), axis=1, bitorder="little"))
    words = _words(keep)
    return (words * GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack(bits: UInt8[Tensor, "O B"], inputs: int) -> Bool[Tensor, "O I"]:
    """Return the keep mask of ``inputs`` columns from its packed bits.

    Raises:
        ValueError: The number of bytes does not match the number of columns.
    """
    _check(bits, (bits.shape[0], inputs))
    if bits.is_cpu:  # NumPy starts no threads: a small mask takes a fifth of the time of torch
        found = np.unpackbits(bits.numpy(), axis=1, count=inputs, bitorder="little")
        return torch.from_numpy(found).view(torch.bool)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    table = torch.arange(256, device=bits.device).to(torch.uint8)[:, None] >> shifts & 1
    words = table.view(torch.int64).flatten()
    spread = words.index_select(0, bits.flatten().int()).view(*bits.shape)
    return spread.view(torch.bool)[:, :inputs].contiguous()


def popcount(bits: UInt8[Tensor, "O B"]) -> Int[Tensor, " O"]:
    """Return the number of kept weights of each row, int64."""
    # Eight bytes are counted at once, 15 times as fast as by a table of bytes.
    words = _words(bits)
    counts = words - ((words >> 1) & 0x5555555555555555)
    counts = (counts & 0x3333333333333333) + ((counts >> 2) & 0x3333333333333333)
    counts = (counts + (counts >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((counts * 0x0101010101010101) >> 56).sum(1)


def _words(rows: Tensor) -> Int[Tensor, "O W"]:
    """Return rows of bytes as words of eight, padded with zeros."""
    if not rows.numel():
        return rows.new_zeros((rows.shape[0], -(-rows.shape[1] // 8)), dtype=torch.int64)
    if rows.shape[1] % 8:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8))
    rows = rows.contiguous()
    # A word must be aligned.
    return (rows.clone() if rows.storage_offset() % 8 else rows).view(torch.int64)


def apply(weight: Float[Tensor, "O I"], bits: UInt8[Tensor, "O B"]) -> None:
    """Set pruned weights to exactly 0, in place; NaN and inf too.

    Args:
        weight: Any float type, any strides.
        bits: Packed keep mask on the same device.

    Raises:
        ValueError: The bits have another size or type, or are on another device.
    """
    _check(bits, tuple(weight.shape))
    if bits.device != weight.device:
        raise ValueError(f"bits are on {bits.device}, the weight is on {weight.device}")
    _apply(weight, bits)


def zero(keep: Bool[Tensor, "..."], value: Float[Tensor, "..."]) -> None:
    """Zero pruned entries in place, NaN too, in PyTorch.

    Args:
        keep: Mask of kept entries.
        value: A tensor of its shape.
    """
    whole = value.view(INTEGERS[value.itemsize])
    whole.mul_(_ones(keep, whole.dtype))


def apply_all(bits: UInt8[Tensor, "R B"], *values: Float[Tensor, "..."]) -> None:
    """Zero pruned entries of tensors with one mask, in place; NaN too.

    Args:
        bits: Packed keep mask of the rows of their last axis, on their device.
        values: One or more tensors of one shape: a weight, its gradient, the state of an optimizer
            for it.
    """
    if values[0].ndim == 2:
        _apply_all(bits, values)
    else:
        for part, *slices in zip(bits.chunk(len(values[0])), *values, strict=True):
            apply_all(part, *slices)


def _apply_all(bits: UInt8[Tensor, "O B"], values: Sequence[Float[Tensor, "O I"]]) -> None:
    if not bits.is_cpu:
        for value in values:
            apply(value, bits)
        return
    outputs, inputs = values[0].shape
    packed = bits.numpy()  # NumPy starts no threads, and its calls take less time
    wholes = [value.view(INTEGERS[value.itemsize]).numpy() for value in values]
    step = max(1, CACHED // max(inputs, 1))  # what is unpacked remains in the cache
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        keep = np.unpackbits(packed[rows], axis=1, count=inputs, bitorder="little").view(np.int8)
        for whole in wholes:
            whole[rows] *= keep


def kept(
    value: Float[Tensor, "..."], keep: Bool[Tensor, "..."], fill: float = 0.0
) -> Float[Tensor, "..."]:
    """Return a tensor with ``fill`` where pruned, also for NaN."""
    whole = value.view(INTEGERS[value.itemsize])
    ones = _ones(keep, whole.dtype)
    found = whole * ones
    if fill:
        bits = int(torch.tensor(fill, dtype=value.dtype).view(whole.dtype))
        found.sub_(ones.sub_(1), alpha=bits)
    return found.view(value.dtype)


def part(
    weight: Float[Tensor, "O I"], keep: Bool[Tensor, "O I"], out: Float[Tensor, "O I"]
) -> None:
    """Split a weight into kept and pruned entries, in place.

    Args:
        weight: Keeps only its pruned entries; the others become 0.
        keep: Mask of kept entries.
        out: Receives the kept entries, 0 elsewhere.
    """
    whole, kept = (tensor.view(INTEGERS[weight.itemsize]) for tensor in (weight, out))
    torch.mul(whole, _ones(keep, whole.dtype), out=kept)
    whole ^= kept


def _ones(keep: Bool[Tensor, "..."], dtype: torch.dtype) -> Int[Tensor, "..."]:
    """Return integers that are 1 where kept, else 0.

    On a CPU, multiplying bits by them is four times as fast as `masked_fill_`.
    """
    return keep.view(torch.int8).to(dtype)


def pack_reference(keep: Bool[Tensor, "O I"]) -> UInt8[Tensor, "O B"]:
    """Return the same as :func:`pack`, bit by bit."""
    bits = torch.zeros(keep.shape[0], -(-keep.shape[1] // 8), dtype=torch.uint8)
    for column in range(keep.shape[1]):
        bits[:, column // 8] |= keep[:, column].cpu().to(torch.uint8) << column % 8
    return bits.to(keep.device)


def _check(bits: Tensor, shape: tuple[int, ...]) -> None:
    size = (shape[0], -(-shape[1] // 8))
    if bits.dtype != torch.uint8 or bits.shape != size:
        raise ValueError(
            f"bits of {shape[1]} columns must be uint8 of shape {size}, "
            f"got {bits.dtype} of shape {tuple(bits.shape)}"
        )


@torch.library.custom_op("prunekit::apply_mask", mutates_args=("weight",))
def _apply(weight: Tensor, bits: Tensor) -> None:
    if runs_triton(weight):
        _launch(weight, bits)
    else:
        _apply_all(bits, [weight])


@_apply.register_fake
def _(weight: Tensor, bits: Tensor) -> None:
    pass


def _launch(weight: Tensor, bits: Tensor) -> None:
    outputs, inputs = weight.shape
    if weight.numel():
        grid = (triton.cdiv(outputs, TILE_O), triton.cdiv(inputs, TILE_I))
        with torch.cuda.device_of(weight):
            _kernel[grid](
                weight, bits, outputs, inputs, *weight.stride(), *bits.stride(),
                WHOLE=inputs % 8 == 0, FULL=outputs % TILE_O == 0 and inputs % TILE_I == 0,
                TILE_O=TILE_O, TILE_B=TILE_I // 8, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


@triton.jit
def _kernel(
    weight_ptr, bits_ptr, O, I,  # noqa: E741
    stride_weight_o, stride_weight_i, stride_bits_o, stride_bits_b,
    WHOLE: tl.constexpr, FULL: tl.constexpr, TILE_O: tl.constexpr, TILE_B: tl.constexpr,
):  # fmt: skip
    # A thread holds the eight weights of a byte, and reads and writes them at once. Zeros alone
    # would be stores of single weights.
    o = tl.program_id(0).to(tl.int64) * TILE_O + tl.arange(0, TILE_O)[:, None, None]
    b = tl.program_id(1).to(tl.int64) * TILE_B + tl.arange(0, TILE_B)[None, :, None]
    j = tl.arange(0, 8)[None, None, :]
    i = b * 8 + j
    ptrs = weight_ptr + o * stride_weight_o + i * stride_weight_i
    bits_ptrs = bits_ptr + o * stride_bits_o + b * stride_bits_b
    if FULL:
        bits = tl.load(bits_ptrs).to(tl.int32)  # [TILE_O, TILE_B, 1]
        weight = tl.load(ptrs)  # [TILE_O, TILE_B, 8]
        tl.store(ptrs, tl.where((bits >> j) & 1 != 0, weight, 0.0))
    else:
        some = (o < O) & (b * 8 < I)
        inside = some & (j >= 0) if WHOLE else some & (i < I)
        bits = tl.load(bits_ptrs, some, other=0).to(tl.int32)
        weight = tl.load(ptrs, inside, other=0.0)
        tl.store(ptrs, tl.where((bits >> j) & 1 != 0, weight, 0.0), inside)
