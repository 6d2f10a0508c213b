"""Journal of a run: one JSON line per entry.

An entry is appended once the work that it names is on disk. Each line carries its own checksum. The
first line that is cut off, altered or written by another program is dropped with all that follow,
and their work is repeated.
"""

import json
import os
import zlib
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

from prunekit.checkpoint.atomic import flush_folder, report_full_disk
from prunekit.checkpoint.lock import FileLock, LockedError, is_held
from prunekit.errors import CheckpointError, ConfigError

JOURNAL = "journal.jsonl"
START = ("start", "")
Entries = dict[tuple[str, str], dict[str, Any]]
"""Values of the entries by kind and name; a later entry replaces an earlier one."""


class Journal:
    """The journal of an output folder, locked by this process.

    Attributes:
        entries: Entries so far; empty if it is not the journal of a run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / JOURNAL
        self.entries: Entries = {}
        self._file: BinaryIO | None = None
        self._lock: FileLock | None = None

    def open(self) -> None:
        """Lock a journal that exists and read its entries.

        Raises:
            ConfigError: Another run is writing to the folder.
        """
        self._claim(self.path)
        self.entries = read_journal(self.path)

    def start(self, values: dict[str, Any]) -> None:
        """Replace the journal by one with nothing but its start entry, atomically.

        Args:
            values: Values of the start entry.

        Raises:
            ConfigError: Another run has just begun in the folder.
        """
        held = self._file, self._lock
        temporary = self.path.with_name(f".{JOURNAL}.tmp")
        self._claim(temporary)
        assert self._file is not None
        if held[0] is None and os.path.lexists(self.path):
            self.close()
            raise _in_use(self.folder)
        self._file.truncate(0)
        self.entries = {}
        self.append(*START, values)
        with report_full_disk(self.folder):
            temporary.replace(self.path)
            flush_folder(self.folder)
        if held[0]:
            held[0].close()

    def check_in_place(self) -> None:
        """Refuse a folder that was moved or replaced in the meantime.

        Raises:
            CheckpointError: Its path leads to another journal, or to none.
        """
        if self._file is None:
            return
        try:
            same = os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except OSError:
            same = False
        if not same:
            raise CheckpointError(
                f"{self.folder}: was moved, removed or replaced while a run was writing to it. "
                "Move it back, if it was moved, and run again with --resume."
            )

    def truncate(self) -> None:
        """Cut off everything after the last valid entry."""
        assert self._file is not None
        self._file.truncate(sum(map(len, _valid_lines(self.path.read_bytes()))))

    def append(self, kind: str, name: str, values: dict[str, Any]) -> None:
        """Append an entry and flush it to disk.

        Args:
            kind: Kind of entry, such as "block".
            name: Name within its kind.
            values: Values, as JSON.
        """
        self.entries[kind, name] = values
        assert self._file is not None
        entry = {"kind": kind, "name": name, "values": values}
        line = json.dumps(entry | {"crc32": _checksum(kind, name, values)}).encode() + b"\n"
        with report_full_disk(self.folder):
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the journal and release its lock."""
        if self._lock:
            self._lock.release()
        if self._file:
            self._file.close()
        self._file = self._lock = None

    def _claim(self, path: Path) -> None:
        """Open and lock a file."""
        with report_full_disk(self.folder):
            file = path.open("ab")
        try:
            # One owner holds the lock under both names of the file, also after it is renamed.
            lock = self._lock if self._lock and self._lock.owner_file else FileLock(file, self.path)
        except LockedError as error:
            file.close()
            raise _in_use(self.folder, str(error)) from None
        self._file, self._lock = file, lock
        # Another run may have replaced the file before it was locked here.
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            self.close()
            raise _in_use(self.folder)


def is_locked(path: Path) -> bool:
    """Return whether a run is writing to a journal now."""
    try:
        with path.open("rb") as file:
            return is_held(file, path)
    except OSError:
        return False  # there is none, or it cannot be read


def read_journal(path: Path) -> Entries:
    """Return the entries of a journal.

    There are none if its first line is no start entry.
    """
    return _entries(_valid_lines(path.read_bytes()))


def is_journal(path: Path) -> bool:
    """Return whether a file is the journal of a run.

    The beginning of a first line counts, as a killed run may leave it.
    """
    if not path.is_file():
        return False
    content, start = path.read_bytes(), b'{"kind": "start", '
    cut_off = b"\n" not in content and start.startswith(content[: len(start)])
    return cut_off or bool(_valid_lines(content))


def _entries(lines: Iterable[bytes]) -> Entries:
    found = (json.loads(line) for line in lines)
    return {(entry["kind"], entry["name"]): entry["values"] for entry in found}


def _valid_lines(content: bytes) -> list[bytes]:
    """Return the lines before the first that is no entry."""
    lines = [*takewhile(_is_entry, content.splitlines(keepends=True))]
    first = json.loads(lines[0]) if lines else {}
    return lines if (first.get("kind"), first.get("name")) == START else []


def _is_entry(line: bytes) -> bool:
    try:
        entry = json.loads(line)
        kind, name, values = entry["kind"], entry["name"], entry["values"]
        typed = isinstance(kind, str) and isinstance(name, str) and isinstance(values, dict)
        whole = typed and line.endswith(b"\n") and _names_files(values)
        return whole and entry["crc32"] == _checksum(kind, name, values)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _names_files(values: dict[str, Any]) -> bool:
    """Return whether the files of an entry are plain names."""
    files, writes = values.get("files") or {}, values.get("writes") or []
    names = [*files, *writes, *files.values()] if isinstance(files, dict) else [None]
    return isinstance(writes, list) and all(isinstance(name, str) for name in names)


def _checksum(kind: str, name: str, values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps([kind, name, values]).encode())


def _in_use(folder: Path, owner: str = "") -> ConfigError:
    return ConfigError(
        f"output.path: another run is writing to {folder}{owner}. Wait until it has ended, or "
        "choose another folder."
    )
