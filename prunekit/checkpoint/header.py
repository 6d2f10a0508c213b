"""Headers of safetensors files, read and validated without reading weights."""

import errno
import json
import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prunekit.checkpoint.atomic import error_number
from prunekit.errors import CheckpointError

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Data types of weights that can be pruned and computed with."""
_FORMAT: dict[str, tuple[int, str]] = {
    "F64": (64, "float64"),
    "F32": (32, "float32"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F6_E2M3": (6, ""),
    "F6_E3M2": (6, ""),
    "F4": (4, "float4_e2m1fn_x2"),
    "C64": (64, "complex64"),
    "I64": (64, "int64"),
    "I32": (32, "int32"),
    "I16": (16, "int16"),
    "I8": (8, "int8"),
    "U64": (64, "uint64"),
    "U32": (32, "uint32"),
    "U16": (16, "uint16"),
    "U8": (8, "uint8"),
    "BOOL": (8, "bool"),
}
"""Bits of a number and its name in torch, by its name in the format."""
DTYPES: dict[str, torch.dtype | None] = {
    name: getattr(torch, known, None) if known else None for name, (_, known) in _FORMAT.items()
}
"""Data types by their names in the format; None where torch has none."""
_NAMES = {dtype: name for name, dtype in DTYPES.items() if dtype}
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library itself."""


@dataclass(frozen=True)
class TensorEntry:
    """Location and layout of a stored tensor.

    Attributes:
        file: The safetensors file.
        dtype: Stored data type; ``torch.uint8`` where torch has none.
        shape: Stored shape.
        nbytes: Size in bytes.
        start: Offset of the first byte in the file.
        unreadable: Name of a data type that torch does not have; "" for others.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    start: int = 0
    unreadable: str = ""


def stored_name(entry: TensorEntry) -> str:
    """Return the name of a tensor's data type in the format."""
    return entry.unreadable or _NAMES[entry.dtype]


def stored_bits(entry: TensorEntry) -> int:
    """Return the bits of a number of a tensor in the file."""
    return _FORMAT[stored_name(entry)][0]


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file, after validating its header.

    Raises:
        CheckpointError: The file cannot be read, is truncated, or its header violates the format.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else MAX_HEADER_BYTES
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file}: is not safetensors, or is truncated in its header.")
            header = json.loads(stream.read(length).decode())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is not a table of tensors.")
    header.pop("__metadata__", None)
    entries = _check_offsets(file, header, 8 + length, size)
    _check_opens(file)
    return entries


def _check_opens(file: Path) -> None:
    """Refuse faults that only the safetensors library finds, such as gaps."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        if error_number(error) == errno.ENOMEM:
            raise MemoryError(f"{file}: {error}") from error
        raise CheckpointError(
            f"{file}: safetensors cannot open it ({error}). Download it again, or move it if "
            "a name in its path is the cause."
        ) from error


def _check_offsets(
    file: Path, header: dict[str, Any], begin: int, size: int
) -> dict[str, TensorEntry]:
    entries, spans, space = {}, [], size - begin
    for name, item in header.items():
        try:
            stored, shape, (start, end) = item["dtype"], item["shape"], item["data_offsets"]
            bits, dtype = _FORMAT[stored][0], DTYPES[stored]
            if (
                any(type(number) is not int for number in (*shape, start, end))
                or min(shape, default=0) < 0
            ):
                raise TypeError("sizes are counts and offsets integers")  # noqa: TRY301
            # Python integers do not overflow.
            fits = 8 * (end - start) == math.prod(shape) * bits
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: {name}: has an invalid header entry.") from error
        if not fits or start < 0 or end > space:
            raise CheckpointError(
                f"{file}: {name}: bytes {start} to {end} do not fit its shape {shape} or the "
                f"{space} bytes of the file. The file is truncated or corrupt; download it again."
            )
        unreadable = "" if dtype else stored
        layout = dtype or torch.uint8, tuple(shape), end - start, begin + start
        entries[name] = TensorEntry(file, *layout, unreadable)
        spans.append((start, end, name))
    spans.sort()
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise CheckpointError(f"{file}: {first} and {second} overlap. The file is corrupt.")
    return entries
