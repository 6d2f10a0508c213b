"""Files of an output folder that prunekit wrote, and their removal.

Only files that the journal or the report names count as written by prunekit. Anyone may have made
these two, so a name that leads out of the folder, or through a link, does not count.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from prunekit.checkpoint.atomic import report_full_disk, temporary_file
from prunekit.checkpoint.journal import JOURNAL, Entries, is_journal, read_journal
from prunekit.checkpoint.lock import owner_file

REPORT = "report.json"
OPENED_FIRST = ("config.json", "model.safetensors.index.json")
"""Files without which a folder does not open as a model; they are removed first."""
RUN = "run"
"""Kind of the journal entry of a sweep that names the ``folder`` of one of its runs."""
MISLEADING = ("*.safetensors", "*.index.json", "*.bin", "adapter_config.json")
"""Files that transformers may open in place of the result, or add to it."""


def recorded_digests(entry: dict[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each file that a journal entry names."""
    return entry.get("files") or {}


def announced_files(entries: Entries) -> list[str]:
    """Return the names of the files that entries announce."""
    return [name for values in entries.values() for name in values.get("writes") or ()]


def owned_files(folder: Path, entries: Entries) -> list[Path]:
    """Return the files of a run in the order of their removal.

    Args:
        folder: The output folder.
        entries: Entries of its journal, which itself is left out.
    """
    names = announced_files(entries)
    for values in entries.values():
        names += recorded_digests(values)
    names += _report_files(folder)
    files = [folder / name for name in dict.fromkeys(names) if _is_inside(name)]
    order = {name: number for number, name in enumerate(OPENED_FIRST)}
    files.sort(key=lambda file: order.get(file.name, len(order)))
    candidates = [each for file in files for each in (file, temporary_file(file))]
    for (kind, _), values in entries.items():
        if kind == RUN and _is_inside(values.get("folder")):
            candidates += _files_of_run(folder / values["folder"])
    return [file for file in candidates if _is_own(folder, file)]


def _files_of_run(folder: Path) -> list[Path]:
    """Return the files of one run of a sweep, its journal last."""
    journal = folder / JOURNAL
    if not journal.is_file():
        return []
    return [*owned_files(folder, read_journal(journal)), journal, temporary_file(journal)]


def foreign_files(folder: Path, owned: Iterable[Path]) -> list[str]:
    """Return the names of files in a folder that are not owned.

    Files of the journal are left out, but not a file with its name that is no journal.
    """
    journal = folder / JOURNAL
    known = {*owned, temporary_file(journal), owner_file(journal)}
    if is_journal(journal):
        known.add(journal)
    shared = {parent for file in known for parent in file.parents}
    return sorted(_foreign(folder, folder, known, shared))


def _foreign(top: Path, folder: Path, known: set[Path], shared: set[Path]) -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            if path in shared:
                yield from _foreign(top, path, known, shared)
            elif any(path.iterdir()):
                yield path.relative_to(top).as_posix()
        elif path not in known:
            yield path.relative_to(top).as_posix()


def in_the_way(foreign: Iterable[str], writes: Iterable[str]) -> str | None:
    """Return a foreign file that conflicts with a run, or None.

    The run would overwrite it, or transformers would open it with the result.

    Args:
        foreign: Names of files that prunekit did not write.
        writes: Names of the files that the run writes.
    """
    written = {str(part) for name in writes for part in (name, *PurePosixPath(name).parents)}
    for name in foreign:
        if name in written or any(PurePosixPath(name).match(each) for each in MISLEADING):
            return name
    return None


def remove(folder: Path, files: Iterable[Path]) -> None:
    """Remove files of a folder, and the subfolders that are then empty.

    Raises:
        CapacityError: The file system refuses it.
    """
    subfolders = set()
    with report_full_disk(folder):
        for file in files:
            file.unlink(missing_ok=True)
            subfolders |= {parent for parent in file.parents if parent.is_relative_to(folder)}
        for subfolder in sorted(subfolders - {folder}, reverse=True):
            if not any(subfolder.iterdir()):
                subfolder.rmdir()


def _report_files(folder: Path) -> list[str]:
    """Return the files that ``report.json`` names; none if it is damaged."""
    try:
        files = json.loads((folder / REPORT).read_bytes())["files"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    return [*files] if isinstance(files, dict) else []


def _is_inside(name: object) -> bool:
    """Return whether a relative name leads to a place inside its folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.parts != ()


def _is_own(folder: Path, file: Path) -> bool:
    """Return whether a file or link exists below no linked folder.

    ``folder`` itself may be a link.
    """
    between = [parent for parent in file.parents if parent != folder]
    between = between[: len(file.relative_to(folder).parts) - 1]
    if any(parent.is_symlink() for parent in between):
        return False
    return file.is_symlink() or file.is_file()
