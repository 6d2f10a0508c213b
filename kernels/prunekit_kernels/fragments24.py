"""Fragment order: the layout of 2:4 matrices for sparse tensor cores.

``mma.sp.m16n8k32`` multiplies 16 rows by 32 columns of a 2:4 matrix. Each lane of a warp has four
registers of kept values and, for two products, one of metadata: which two of four each pair was. In
fragment order the data of a lane is contiguous, so a warp reads whole cache lines and shuffles
nothing. The order only permutes: shapes, dtypes and bytes are unchanged, and casting commutes.

    values    [O/16, I/32] products × [8 g, 4 t] lanes × [2 column halves, 2 row halves] registers
    metadata  [O/16, I/256] × [8 g, 4 t] lanes × 4 registers, each two products of K = 32
              lane t of four: half t % 2 of the columns of product t // 2; rows g low, g + 8 high

Source: PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types".
Shapes: T tokens, O output features (multiple of 16), I input features (multiple of 256), H = I / 2,
B = I / 8 bytes.
"""

from functools import cache

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from prunekit_kernels.sparse24 import Sparse24

TOKENS = 8  # tokens of one product


def has_fragments(outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Return whether fragment order supports this shape and dtype.

    Args:
        outputs: Rows of the matrix.
        inputs: Columns of the matrix.
        dtype: Type of its values.
    """
    return dtype in (torch.bfloat16, torch.float16) and outputs % 16 == 0 and inputs % 256 == 0


def to_fragments(compressed: Sparse24) -> Sparse24:
    """Return a compressed matrix in fragment order, with unchanged shapes."""
    values, keep = compressed
    words = values.reshape(_words(values))
    meta = _table(keep.device)[keep.flatten().int()].view(torch.int16).view(_meta(values))
    return Sparse24(
        words.permute(0, 3, 2, 5, 4, 1, 6).reshape(values.shape),
        meta.permute(0, 3, 2, 5, 6, 4, 1).contiguous().view(torch.uint8).view(keep.shape),
    )


def from_fragments(fragments: Sparse24) -> Sparse24:
    """Return the matrix that :func:`to_fragments` permuted, in row order."""
    values, keep = fragments
    o, two, g, k, halves, t, pair = _words(values)
    words = values.reshape(o, k, g, t, halves, two, pair).permute(0, 5, 2, 1, 4, 3, 6)
    o, two, g, k, quarters, step, half = _meta(values)
    meta = keep.view(torch.int16).view(o, k, g, step, half, quarters, two)
    meta = meta.permute(0, 6, 2, 1, 5, 3, 4).contiguous().view(torch.uint8)
    return Sparse24(
        words.reshape(values.shape),
        _table(keep.device, back=True)[meta.flatten().int()].view(keep.shape),
    )


def token_fragments(x: Float[Tensor, "T I"]) -> Int32[Tensor, "P K 32 4"]:
    """Return tokens in lane order, padded to multiples of 8."""
    tokens, inputs = x.shape
    padded = x.new_zeros(-(-tokens // TOKENS) * TOKENS, inputs)
    padded[:tokens] = x
    words = padded.view(torch.int32).view(-1, 8, inputs // 32, 4, 4)
    return words.permute(0, 2, 1, 4, 3).contiguous().view(-1, inputs // 32, 32, 4)


def _words(values: Tensor) -> tuple[int, ...]:
    """Return the row-major axes of the kept values.

    16 rows as [2, 8 g], products of 32 columns, their kept values as [2 halves, 4 t, 2].
    """
    outputs, half = values.shape
    return outputs // 16, 2, 8, half // 16, 2, 4, 2


def _meta(values: Tensor) -> tuple[int, ...]:
    """Return the row-major axes of the metadata.

    16 rows as [2, 8 g], 256 columns as [4 registers, 2 products, 2 halves].
    """
    outputs, half = values.shape
    return outputs // 16, 2, 8, half // 128, 4, 2, 2


def _table(device: torch.device, *, back: bool = False) -> Tensor:
    """Return a table from keep bits to metadata, or ``back``.

    Metadata of a group: index of the first kept | index of the second kept << 2. Within the capture
    of a graph the table belongs to the graph.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _computed(device, back=back)
    return _kept(device, back=back)


def _computed(device: torch.device, *, back: bool) -> Tensor:
    """Return the table, made on the device; other entries than 2 of 4 are 0."""
    byte = torch.arange(256, device=device)
    nibbles = byte[:, None] >> torch.arange(0, 8, 4, device=device) & 15  # [256, 2]
    if back:
        low, high = nibbles & 3, nibbles >> 2
        found, valid = (1 << low) | (1 << high), low < high
    else:
        bits = nibbles[:, :, None] >> torch.arange(4, device=device) & 1
        low, high = bits.argmax(2), 3 - bits.flip(2).argmax(2)
        found, valid = low | high << 2, bits.sum(2) == 2
    found = found * valid.all(1, keepdim=True)
    return (found[:, 0] | found[:, 1] << 4).to(torch.uint8)


_kept = cache(_computed)
