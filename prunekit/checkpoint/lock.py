"""Exclusive locks on files, also where the file system has none."""

import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL})
"""Errors of file systems without locks, such as Lustre mounted without them, or some NFS."""


class LockedError(Exception):
    """Another process holds the lock; the message names it, if known."""


class FileLock:
    """An exclusive lock on an open file.

    It ends with the process that holds it. Where the file system has no locks, a file next to it
    names that process. If a process of this machine has died, its lock is free; of a process on
    another machine this is not known.

    Args:
        file: The file, open.
        path: Path of the file.

    Raises:
        LockedError: Another process holds the lock.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.owner_file: Path | None = None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self._write_owner(owner_file(path))

    def release(self) -> None:
        """Remove the file that names the owner.

        The lock itself ends when the open file is closed.
        """
        if self.owner_file:
            self.owner_file.unlink(missing_ok=True)
            self.owner_file = None

    def _write_owner(self, path: Path) -> None:
        content, other = json.dumps(_owner(os.getpid())).encode(), {}
        for _ in range(3):  # an owner that died is removed; another process may be faster
            with suppress(FileExistsError):
                opened = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                with os.fdopen(opened, "wb") as file:
                    file.write(content)
                self.owner_file = path
                return
            other = _read_owner(path)
            if not _has_ended(other):
                break
            path.unlink(missing_ok=True)
        raise LockedError(
            f": process {other.get('process', '?')} on {other.get('host', '?')}. If it was killed "
            f"there, remove {path}"
        )


def is_held(file: BinaryIO, path: Path) -> bool:
    """Return whether a process holds the lock of an open file.

    Several processes may ask at once, and none of them seems to hold it.

    Args:
        file: The file, open.
        path: Path of the file.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        owner = owner_file(path)
        return owner.exists() and not _has_ended(_read_owner(owner))
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def owner_file(path: Path) -> Path:
    """Return the path of the file that names a lock's owner."""
    return path.with_name(f".{path.name}.lock")


def _owner(process: int) -> dict[str, Any]:
    """Return a process of this machine and its start time."""
    boot = started = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        boot += str(Path("/proc/self/ns/pid").readlink())
        # The name of the program, which may hold anything, is in parentheses.
        content = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        started = content.rpartition(")")[2].split()[19]
    return {"host": socket.gethostname(), "boot": boot, "process": process, "started": started}


def _read_owner(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _has_ended(owner: dict[str, Any]) -> bool:
    """Return whether the owner of a lock has certainly ended."""
    process = owner.get("process")
    if not isinstance(process, int) or owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return owner != _owner(process)
