"""Atomic file writing: after a crash a file is complete or absent."""

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from prunekit.errors import CapacityError


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file atomically, also with respect to power failures."""
    with _replace_atomically(file) as temporary:
        temporary.write_bytes(content)


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file atomically."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with _replace_atomically(file) as temporary:
        temporary.touch()  # gets the permissions of the umask, which save_file ignores
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _replace_atomically(file: Path) -> Iterator[Path]:
    """Provide a temporary path that replaces the file once flushed to disk."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with report_full_disk(file.parent):
            yield temporary
            _fsync(temporary)
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(file.parent)


@contextmanager
def report_full_disk(folder: Path) -> Iterator[None]:
    """Turn full-disk errors into one that says how to continue.

    Raises:
        CapacityError: The disk or quota is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        # safetensors reports the system's error in its message only.
        if not full and f"(os error {errno.ENOSPC})" not in str(error):
            raise
        raise CapacityError(
            f"{folder}: the disk is full. Finished work is kept: free some space, then run again "
            "with --resume."
        ) from error


def _fsync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
