"""Atomic file writing: after a crash a file is complete or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from prunekit.errors import CapacityError

NOT_OFFERED = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EBADF}
)
"""Errors of file systems that do not let a folder be flushed, or permissions be set."""
FULL = {
    errno.ENOSPC: "the disk is full, or has no room for more files",
    errno.EDQUOT: "the quota of this user is used up",
    errno.EFBIG: "files may not become that large (see ulimit -f)",
}
REMEDY = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit",
}


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file atomically, also with respect to power failures."""
    with replace_atomically(file) as temporary:
        temporary.write_bytes(content)


def json_bytes(content: object) -> bytes:
    """Return the content of a JSON file, as people read it.

    Half a surrogate pair, which names of files and JSON can hold, but not UTF-8, is escaped.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False)
    return text.encode(errors="backslashreplace") + b"\n"


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def temporary_file(file: Path) -> Path:
    """Return the path of a file while it is being written."""
    return file.with_name(f".{file.name}.tmp")


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, where possible."""
    with _where_offered():
        _fsync(folder)


def missing_guarantees(folder: Path) -> list[str]:
    """Return notes on guarantees that a folder's file system lacks."""
    notes = []
    try:
        _fsync(folder)
    except OSError as error:
        notes.append(
            f"{folder}: its file system cannot flush a folder ({error.strerror}); after a power "
            "failure finished files may be missing, whose work --resume repeats."
        )
    return notes


@contextmanager
def replace_atomically(file: Path) -> Iterator[Path]:
    """Provide a temporary path that replaces the file once flushed to disk.

    Raises:
        CapacityError: The file system refuses a write.
    """
    temporary = temporary_file(file)
    with report_full_disk(file.parent):
        try:
            yield temporary
            _fsync(temporary)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        flush_folder(file.parent)


@contextmanager
def report_full_disk(folder: Path) -> Iterator[None]:
    """Turn a failed write into an error that says how to continue.

    Raises:
        CapacityError: The file system refused a write, as if the disk or quota is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error_number(error)
        if number is None:
            raise
        problem = FULL.get(number, f"cannot be written to: {os.strerror(number)}")
        raise CapacityError(
            f"{folder}: {problem}. Finished work is kept: {REMEDY.get(number, 'mend that')}, then "
            "run again with --resume."
        ) from error


def error_number(error: OSError | SafetensorError) -> int | None:
    """Return the system's number of an error.

    safetensors has it in its message only.
    """
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


@contextmanager
def _where_offered() -> Iterator[None]:
    """Ignore that a file system lacks an operation."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise


def _fsync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
