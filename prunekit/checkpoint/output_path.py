"""Checks that an output folder can be created and holds no input.

Paths are compared by device and inode, after links are resolved, so links and mounts do not matter.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from prunekit.errors import ConfigError
from prunekit.formatting import unicode_text

MAX_SHARD_BYTES = 50 * 10**9
"""Bytes of a weight file at most, as ``save_pretrained`` of transformers has them."""
LONGEST_SUFFIX = "/.model-00000-of-00000.safetensors.tmp"
"""The longest path of a usual file, relative to an output folder."""
Identity = tuple[int, int]


def nearest_existing_folder(path: Path, name: str = "output.path") -> Path:
    """Return ``path``, or its nearest parent that exists.

    Args:
        path: Folder to be created.
        name: Config key or option of the path, for the message.

    Raises:
        ConfigError: The path, or one of its parents, is a file or a link to nothing, or a name is
            longer than the file system allows.
    """
    # Unlike the methods of Path, these functions do not raise on invalid names.
    places = (path, *path.absolute().parents)
    nearest = next(place for place in places if os.path.lexists(place))
    if not os.path.isdir(nearest):  # noqa: PTH112
        kind = "a link to nothing" if nearest.is_symlink() and not nearest.exists() else "a file"
        raise ConfigError(
            f"{name}: {nearest} is {kind}, so {path} cannot be a folder; name another."
        )
    if problem := _unusable_name(path, nearest):
        raise ConfigError(f"{name}: {path}: {problem}.")
    return nearest


def check_apart(output: Path, inputs: Iterable[Path], name: str = "output.path") -> None:
    """Refuse an output folder that holds an input or is inside one.

    Args:
        output: Folder that is written; it need not exist.
        inputs: Files and folders that are read.
        name: Config key or option of the path, for the message.

    Raises:
        ConfigError: An input is in the output folder, or the output folder in an input.
    """
    above_output = _identities_above(output)
    own = _identity(output)
    for path in inputs:
        if _identity(path) in above_output:
            raise ConfigError(
                f"{name}: {output} is {_same_or(output, path, 'in')} {path}, which is read. Name a "
                "folder elsewhere."
            )
        if own and own in _identities_above(path):
            raise ConfigError(
                f"{name}: {output} holds {path}, which is read. Name a folder elsewhere."
            )


def _same_or(path: Path, other: Path, relation: str) -> str:
    return "the same folder as" if _identity(path) == _identity(other) else relation


def _identities_above(path: Path) -> set[Identity]:
    """Return the identities of a resolved path and all its parents."""
    real = Path(os.path.realpath(path))
    return {found for place in (real, *real.parents) if (found := _identity(place))}


def _identity(path: Path) -> Identity | None:
    """Return device and inode of a resolved path; None if absent."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _unusable_name(path: Path, nearest: Path) -> str | None:
    """Return why no folder can be created at ``path``, by its name."""
    if "\0" in str(path):
        return "a path cannot hold a null character"
    if unicode_text(absolute := str(path.absolute())) != absolute:
        return "a name in it is not UTF-8, and safetensors writes to no such path"
    most = os.pathconf(nearest, "PC_NAME_MAX")
    for part in path.absolute().parts:
        if len(os.fsencode(part)) > most:
            return f"a name in it has {len(os.fsencode(part))} bytes, more than {most}"
    if len(os.fsencode(path.absolute())) + len(LONGEST_SUFFIX) > os.pathconf(
        nearest, "PC_PATH_MAX"
    ):
        return "it is longer than the file system allows"
    return None
