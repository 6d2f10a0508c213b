"""One safetensors file from the tensors of several, copied byte by byte.

The library's own writer holds all tensors of a file in memory; this holds one chunk.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from prunekit.checkpoint.atomic import replace_atomically
from prunekit.checkpoint.header import TensorEntry, stored_bits, stored_name
from prunekit.errors import CheckpointError

CHUNK_BYTES = 1 << 22
ALIGNMENT = 8
"""Bytes to a multiple of which the format pads a header, so that tensors lie aligned."""


def write_joined(file: Path, entries: Mapping[str, TensorEntry]) -> str:
    """Copy tensors of other files into one file, atomically.

    Tensors of wide types come first, then by name, as the library orders them.

    Args:
        file: The file to write.
        entries: The tensors by name, as :func:`prunekit.checkpoint.header.read_header` finds them.

    Returns:
        The SHA-256 of the file.

    Raises:
        CapacityError: The file system refuses to write.
        CheckpointError: A file that is read was cut off in the meantime.
    """
    order = sorted(entries, key=lambda name: (-stored_bits(entries[name]), name))
    digest = hashlib.sha256()
    with replace_atomically(file) as temporary, temporary.open("wb") as stream:
        for chunk in _content({name: entries[name] for name in order}):
            stream.write(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def _content(entries: Mapping[str, TensorEntry]) -> Iterator[bytes]:
    """Yield the bytes of a file with tensors in this order."""
    header = json.dumps(_header(entries), separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    yield len(header).to_bytes(8, "little") + header
    for entry in entries.values():
        yield from _stored_bytes(entry)


def _header(entries: Mapping[str, TensorEntry]) -> dict[str, object]:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.nbytes
        table[name] = {
            "dtype": stored_name(entry),
            "shape": [*entry.shape],
            "data_offsets": [start, end],
        }
    return table


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
