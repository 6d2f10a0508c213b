"""Safetensors files, written and hashed chunk by chunk.

The library's own writer holds all tensors of a file in memory, and the file would be read again for
its digest. These are its bytes: tensors of wide types come first, then by name.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from prunekit.checkpoint.atomic import replace_atomically
from prunekit.checkpoint.header import TensorEntry, stored_bits, stored_name
from prunekit.errors import CheckpointError

CHUNK_BYTES = 1 << 22
ALIGNMENT = 8
"""Bytes to a multiple of which the format pads a header, so that tensors lie aligned."""
PAIRS = getattr(torch, "float4_e2m1fn_x2", None)
"""Type of two numbers each, which the format counts one by one."""


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors into one file, atomically.

    Args:
        file: The file to write.
        tensors: The tensors by name; they may share memory.

    Returns:
        The SHA-256 of the file.

    Raises:
        CapacityError: The file system refuses to write.
    """
    entries = {name: _entry(file, tensor) for name, tensor in tensors.items()}
    return _write(file, entries, lambda name: _chunks(tensors[name]))


def write_joined(file: Path, entries: Mapping[str, TensorEntry]) -> str:
    """Copy tensors of other files into one file, atomically.

    Args:
        file: The file to write.
        entries: The tensors by name, as :func:`prunekit.checkpoint.header.read_header` finds them.

    Returns:
        The SHA-256 of the file.

    Raises:
        CapacityError: The file system refuses to write.
        CheckpointError: A file that is read was cut off in the meantime.
    """
    return _write(file, entries, lambda name: _stored_bytes(entries[name]))


def _write(
    file: Path,
    entries: Mapping[str, TensorEntry],
    content: Callable[[str], Iterator[bytes | memoryview]],
) -> str:
    """Write a file of tensors with the given content; return its SHA-256."""
    order = sorted(entries, key=lambda name: (-stored_bits(entries[name]), name))
    digest = hashlib.sha256()
    with replace_atomically(file) as temporary, temporary.open("wb") as stream:

        def write(chunk: bytes | memoryview) -> None:
            stream.write(chunk)
            digest.update(chunk)

        header = _header({name: entries[name] for name in order})
        write(len(header).to_bytes(8, "little") + header)
        for name in order:
            for chunk in content(name):
                write(chunk)
    return digest.hexdigest()


def _header(entries: Mapping[str, TensorEntry]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.nbytes
        table[name] = {
            "dtype": stored_name(entry),
            "shape": [*entry.shape],
            "data_offsets": [start, end],
        }
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % ALIGNMENT)


def _entry(file: Path, tensor: Tensor) -> TensorEntry:
    shape = tuple(tensor.shape)
    if tensor.dtype is PAIRS:
        shape = (*shape[:-1], 2 * shape[-1])
    return TensorEntry(file, tensor.dtype, shape, tensor.nbytes)


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor; a contiguous one is not copied."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for chunk in content.split(CHUNK_BYTES):
        yield chunk.numpy().data


def _stored_bytes(entry: TensorEntry) -> Iterator[bytes]:
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        left = entry.nbytes
        while left:
            chunk = stream.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise CheckpointError(
                    f"{entry.file}: was cut off while it was read. Run again with --resume."
                )
            left -= len(chunk)
            yield chunk
