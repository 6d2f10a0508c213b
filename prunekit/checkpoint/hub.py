"""Checkpoint folders, local or downloaded from the Hugging Face hub."""

import os
from collections.abc import Iterable
from glob import escape
from pathlib import Path

from prunekit.checkpoint.companions import LICENCES, NAMES, TEMPLATES, VERSIONED
from prunekit.checkpoint.weight_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    is_file,
    named_weights,
    read_json,
    shard_names,
)
from prunekit.errors import CheckpointError

CARD = "README.md"
"""Model card, which names licence and tags."""


def checkpoint_folder(path: str, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint, downloaded from the hub if necessary.

    Only the files of a checkpoint are downloaded: its config, its companions and one set of
    weights, the one that transformers would read.

    Args:
        path: A local folder or a hub id.
        revision: Branch, tag or commit of a hub id.

    Raises:
        CheckpointError: The folder does not exist, and the hub id cannot be downloaded.
    """
    # Unlike the methods of Path, these do not raise on invalid file names.
    if os.path.isdir(path):  # noqa: PTH112
        return Path(path)
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: is not a folder; name the folder of a checkpoint.")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _download(path, revision)
    except (
        HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{path}: there is no such folder, and it could not be downloaded from the hub either "
            f"({type(error).__name__}). Name a local folder or a hub id that can be reached."
        ) from error


def _download(name: str, revision: str | None) -> Path:
    """Download a checkpoint; first the files that say where its weights are."""
    from huggingface_hub import snapshot_download

    def fetch(patterns: Iterable[str], revision: str | None, *, below: str = "") -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[below + pattern for pattern in patterns],
                # A star also matches "/": without this, patterns would reach into other folders.
                ignore_patterns=None if below else ["*/*"],
            )
        )

    licences = map(_any_case, LICENCES)
    folder = fetch(["config.json", CARD, INDEX_FILE, *NAMES, *VERSIONED, *licences], revision)
    commit = folder.name  # a branch may change in between
    config = read_json(folder / "config.json", "a Hugging Face checkpoint has one")
    named = named_weights(folder, config)
    fetch([escape(named or WEIGHTS_FILE)], commit)
    fetch(["*.jinja"], commit, below=f"{TEMPLATES}/")
    index = folder / (named or INDEX_FILE)
    by_index = index.suffix == ".json" and (named or not is_file(folder / WEIGHTS_FILE))
    if by_index and is_file(index):
        fetch(map(escape, sorted(set(shard_names(index).values()))), commit)
    return folder


def _any_case(pattern: str) -> str:
    """Return a pattern of lower-case letters that also matches upper-case ones."""
    return "".join(f"[{each}{each.upper()}]" if each.isalpha() else each for each in pattern)
