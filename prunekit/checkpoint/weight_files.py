"""The weight files of a checkpoint folder, chosen as transformers chooses them.

The first of these is read, and no other file: the one that the key ``transformers_weights`` of
``config.json`` names, ``model.safetensors``, and the shards that ``model.safetensors.index.json``
lists.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunekit.checkpoint.header import MAX_HEADER_BYTES, TensorEntry, read_header
from prunekit.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
WEIGHTS_KEY = "transformers_weights"
"""Key of ``config.json`` for weights under another name."""
MAX_JSON_BYTES = MAX_HEADER_BYTES
MAX_JSON_DEPTH = 64
"""Levels of tables and lists in a JSON file; Python writes fewer than it reads."""
PICKLES = {".bin", ".pt", ".pth"}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of ``config.json``.

    Raises:
        CheckpointError: The file is missing or not a JSON object.
    """
    return read_json(folder / "config.json", "a Hugging Face checkpoint has one")


def read_entries(folder: Path, config: Mapping[str, Any] | None = None) -> dict[str, TensorEntry]:
    """Return the tensors of a folder as stored in its files.

    Like transformers, it reads all tensors of the files that an index lists; of tensors with the
    same name, the one in the last file counts.

    Args:
        folder: Folder of the checkpoint.
        config: Content of its ``config.json``, which may name the weight files.

    Raises:
        CheckpointError: A file is missing, corrupt, or of an unsupported kind.
    """
    entries: dict[str, TensorEntry] = {}
    for file, names in weight_files(folder, config or {}).items():
        header = read_header(file)
        if missing := names - header.keys():
            raise CheckpointError(f"{file}: lacks {min(missing)}, which the index places there.")
        entries |= header
    return entries


def weight_files(folder: Path, config: Mapping[str, Any]) -> dict[Path, set[str]]:
    """Return the weight files in order, with the tensors of each.

    The tensors are those that an index lists; none without an index.

    Args:
        folder: Folder of the checkpoint.
        config: Content of its ``config.json``.

    Raises:
        CheckpointError: A file is missing, is a pickle, or lies outside the folder.
    """
    file = folder / (named_weights(folder, config) or WEIGHTS_FILE)
    if not config.get(WEIGHTS_KEY) and not is_file(file):
        file = folder / INDEX_FILE
    if not is_file(file):
        raise CheckpointError(_no_weights(folder, file))
    return _shards(file) if file.suffix == ".json" else {file: set()}


def named_weights(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the file that ``config.json`` names for the weights, or None.

    Raises:
        CheckpointError: It is no safetensors file or index, or lies outside the folder.
    """
    name = config.get(WEIGHTS_KEY)
    if not name:
        return None
    endings = (".safetensors", ".safetensors.index.json")
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(endings):
        raise CheckpointError(
            f"{folder / 'config.json'}: {WEIGHTS_KEY} names {name!r}, which is not a file in the "
            f"folder that ends in {' or '.join(endings)}."
        )
    return name


def shard_names(index: Path) -> dict[str, str]:
    """Return the file of each tensor that an index lists.

    Raises:
        CheckpointError: The index is no table of tensors, or leaves its folder.
    """
    weight_map = read_json(index, "it is the index of the shards").get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: its weight_map is not a table of tensors.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
            raise CheckpointError(
                f"{index}: weight_map places {name} at {shard!r}, outside the folder."
            )
    return weight_map


def read_json(file: Path, why: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        file: The file.
        why: Its purpose, for the error about a missing file.

    Raises:
        CheckpointError: The file is missing, cannot be read, or is not a JSON object.
    """
    if not os.path.lexists(file):
        raise CheckpointError(f"{file}: is missing; {why}.")
    # Opening a named pipe would block.
    if not is_file(file):
        raise CheckpointError(f"{file}: is not a file, or a link to nothing; {why}.")
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: has over {MAX_JSON_BYTES:,} bytes; {why}.")
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); {why}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: is not a JSON object.")
    if _is_deeper(content, MAX_JSON_DEPTH):
        raise CheckpointError(f"{file}: nests tables and lists over {MAX_JSON_DEPTH} deep.")
    return content


def _is_deeper(value: object, depth: int) -> bool:
    """Return whether tables and lists nest more than ``depth`` deep."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(parts) and (depth == 0 or any(_is_deeper(part, depth - 1) for part in parts))


def is_file(path: Path) -> bool:
    """Return whether a path is a file; False for invalid names."""
    # Unlike the method of Path, this does not raise on invalid file names.
    return os.path.isfile(path)  # noqa: PTH113


def _shards(index: Path) -> dict[Path, set[str]]:
    """Return the files that an index lists, with the tensors of each."""
    files: dict[Path, set[str]] = {}
    for name, shard in sorted(shard_names(index).items(), key=lambda item: item[1]):
        files.setdefault(index.parent / shard, set()).add(name)
    if not files:
        raise CheckpointError(f"{index}: lists no tensor.")
    for file in files:
        if not is_file(file):
            raise CheckpointError(f"{file}: is missing, but {index.name} lists it.")
    return files


def _no_weights(folder: Path, sought: Path) -> str:
    """Return the message about a folder whose weights are missing or pickles."""
    if sought.name != INDEX_FILE:
        return f"{sought}: is missing, but {WEIGHTS_KEY} in config.json names it."
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"{folder}: holds {pickles[0]}, a pickle, which can run code when opened. Convert it "
            "once, if you trust it: AutoModel….from_pretrained(…).save_pretrained(…)."
        )
    return f"{folder}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}."
