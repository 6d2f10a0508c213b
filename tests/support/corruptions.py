"""Changes of compressed parts that every reader has to refuse.

Each is a name, the part, its edit (None: the part is removed), and words of the message. They
spoil any weight with half of its values, some zeros and columns that fill no last byte.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Corruption(NamedTuple):
    """A change of one part, and words of the message that refuses it."""

    name: str
    part: str
    edit: Callable[[Tensor], Tensor] | None
    message: str

    def __str__(self) -> str:
        return self.name


def _set(tensor: Tensor, index: object, value: object) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


def _pad_bits(keep: Tensor) -> Tensor:
    return _set(keep, (..., -1), keep[..., -1] | 0x80)


def _one_more(keep: Tensor) -> Tensor:
    """Set the lowest bit that is not set in the first byte with one."""
    flat = keep.flatten().clone()
    at = int((flat != 255).nonzero()[0])
    flat[at] |= flat[at] + 1
    return flat.view(keep.shape)


_BITS = "columns|groups of four|row offsets do not match"
_COMMON = [
    Corruption("no values", "weight", None, "weight"),
    Corruption("no bits", "keep", None, "keep"),
    Corruption("whole numbers", "weight", lambda t: t.short(), "values have type torch.int16"),
    Corruption("fewer values", "weight", lambda t: t[..., :-2], "weight has shape"),
    Corruption("values as a row", "weight", lambda t: t.view(1, 1, -1), "weight has shape"),
    Corruption("fewer rows", "keep", lambda t: t[:-1], "keep has shape"),
    Corruption("fewer columns", "keep", lambda t: t[:, :-1], "keep has shape"),
    Corruption("bits as bool", "keep", lambda t: t.bool(), "keep has type torch.bool"),
    Corruption("bits as int64", "keep", lambda t: t.long(), "keep has type torch.int64"),
    Corruption("bits as float", "keep", lambda t: t.float(), "keep has type torch.float32"),
    Corruption("all bits zero", "keep", torch.zeros_like, _BITS),
    Corruption("all bits set", "keep", lambda t: torch.full_like(t, 255), _BITS),
    Corruption("halved bits", "keep", lambda t: t & 0x55, _BITS),
    Corruption("one bit more", "keep", _one_more, _BITS),
    Corruption("inverted bits", "keep", lambda t: ~t, _BITS),
    Corruption("pad bits", "keep", _pad_bits, "bits are set beyond its"),
]
CORRUPTIONS = {
    "2:4": [
        *_COMMON,
        Corruption("3 + 1", "keep", lambda t: _set(t, (0, 0), 0x17), "2 groups of four"),
        Corruption("4 + 0", "keep", lambda t: _set(t, (0, 0), 0x0F), "2 groups of four"),
        Corruption("1 + 2", "keep", lambda t: _set(t, (0, 0), 0x13), "groups of four"),
    ],
    "bitmask": [
        *_COMMON,
        Corruption("no offsets", "row_offsets", None, "row_offsets"),
        Corruption("32 bits", "row_offsets", lambda t: t.int(), "row_offsets has type torch.int32"),
        Corruption("too few", "row_offsets", lambda t: t[1:], "row_offsets has shape"),
        Corruption("negative", "row_offsets", lambda t: t - 3, "row offsets do not match"),
        Corruption("lowest", "row_offsets", lambda t: _set(t, 0, -(2**63)), "row offsets do not"),
        Corruption("beyond", "row_offsets", lambda t: _set(t, -1, 2**40), "row offsets do not"),
        Corruption("highest", "row_offsets", lambda t: _set(t, -1, 2**63 - 1), "row offsets do"),
        Corruption("by one", "row_offsets", lambda t: t + 1, "row offsets do not match"),
        Corruption("reversed", "row_offsets", lambda t: t.flip(0), "row offsets do not match"),
        Corruption("all zero", "row_offsets", torch.zeros_like, "row offsets do not match"),
    ],
}
CASES = [(kind, each) for kind, corruptions in CORRUPTIONS.items() for each in corruptions]


def spoiled(
    parts: dict[str, Tensor], corruption: Corruption, prefix: str = ""
) -> dict[str, Tensor]:
    """Return parts with one changed or removed.

    Args:
        parts: Tensors by name.
        corruption: The change.
        prefix: What precedes the name of the part.
    """
    name = prefix + corruption.part
    others = {each: tensor for each, tensor in parts.items() if each != name}
    if corruption.edit is None:
        return others
    return others | {name: corruption.edit(parts[name]).contiguous()}
