"""Headers of safetensors files, read and validated without reading weights."""

import json
import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from prunekit.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library itself."""


@dataclass(frozen=True)
class TensorEntry:
    """Location and layout of a stored tensor.

    Attributes:
        file: The safetensors file.
        dtype: Stored data type.
        shape: Stored shape.
        nbytes: Size in bytes.
        start: Offset of the first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    start: int = 0


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file, after validating its header.

    Raises:
        CheckpointError: The file is truncated, or its header violates the format.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else MAX_HEADER_BYTES
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{file}: is not safetensors, or is truncated in its header.")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: its header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is not a table of tensors.")
    header.pop("__metadata__", None)
    return _check_offsets(file, header, 8 + length, size)


def _check_offsets(
    file: Path, header: dict[str, Any], begin: int, size: int
) -> dict[str, TensorEntry]:
    entries, spans, space = {}, [], size - begin
    for name, item in header.items():
        try:
            dtype, shape, (start, end) = DTYPES[item["dtype"]], item["shape"], item["data_offsets"]
            if (
                any(type(number) is not int for number in (*shape, start, end))
                or min(shape, default=0) < 0
            ):
                raise TypeError("sizes are counts and offsets integers")  # noqa: TRY301
            # Python integers do not overflow.
            fits = end - start == math.prod(shape) * dtype.itemsize
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: {name}: has an invalid header entry.") from error
        if not fits or start < 0 or end > space:
            raise CheckpointError(
                f"{file}: {name}: bytes {start} to {end} do not fit its shape {shape} or the "
                f"{space} bytes of the file. The file is truncated or corrupt; download it again."
            )
        entries[name] = TensorEntry(file, dtype, tuple(shape), end - start, begin + start)
        spans.append((start, end, name))
    spans.sort()
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise CheckpointError(f"{file}: {first} and {second} overlap. The file is corrupt.")
    return entries
