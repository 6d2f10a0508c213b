"""TODO-DOC prunekit/checkpoint/atomic.py (out of prunekit/checkpoint.py)."""

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
    """Write a file so that it is there whole or not at all, even when the power goes."""
    with _whole_or_not(file) as temporary:
        temporary.write_bytes(content)


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file that is there whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with _whole_or_not(file) as temporary:
        temporary.touch()  # with the permissions that the user's umask gives; save_file ignores it
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)


def digest(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _whole_or_not(file: Path) -> Iterator[Path]:
    """Give a temporary path to write to; it takes the file's place once it is on the disk."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with names_a_full_disk(file.parent):
            yield temporary
            _sync(temporary)
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(file.parent)


@contextmanager
def names_a_full_disk(folder: Path) -> Iterator[None]:
    """Say what to do where the disk is full.

    Raises:
        CapacityError: It is.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        # safetensors tells what the system said, in words.
        if not full and f"(os error {errno.ENOSPC})" not in str(error):
            raise
        raise CapacityError(
            f"{folder}: the disk is full. What was finished is kept: make room, and run again with "
            "--resume."
        ) from error


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
