"""Read Hugging Face checkpoint folders: config, headers, tensors by name.

Only safetensors is supported: headers can be read without weights, and no code from the
checkpoint is executed.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunekit.checkpoint.compressed import QUANT_METHOD, CompressedWeight, compressed_weights
from prunekit.checkpoint.header import TensorEntry, read_header
from prunekit.checkpoint.hub import COMPANION_SUFFIXES
from prunekit.errors import CheckpointError

CHUNK_BYTES = 1 << 20
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder whose config and headers are validated.

    Compressed weights appear as the dense weights that they represent.

    Attributes:
        folder: The folder.
        config: Content of ``config.json``, without the storage format of the weights.
        entries: Tensors by name; compressed weights with their dense shapes and sizes.
        file_entries: Tensors as stored in the files.
        compressed: Compressed weights, by name of the dense weight.
        permuted_axes: Axis along which a tensor is permuted when read, by name.
        permutation: The permutation of these axes.
    """

    folder: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    file_entries: dict[str, TensorEntry]
    compressed: dict[str, CompressedWeight] = field(default_factory=dict)
    permuted_axes: dict[str, int] = field(default_factory=dict)
    permutation: list[int] = field(default_factory=list)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return dense tensors on the CPU, by name.

        They are memory-mapped, except compressed ones, which are expanded, and permuted ones.

        Raises:
            CheckpointError: A compressed weight is corrupt.
        """
        names = list(names)
        tensors = self._map([name for name in names if name not in self.compressed])
        tensors |= {name: self._expand(name) for name in names if name in self.compressed}
        permuted, order = self.permuted_axes.keys() & tensors, torch.tensor(self.permutation)
        return tensors | {
            name: tensors[name].index_select(self.permuted_axes[name], order) for name in permuted
        }

    def warm_page_cache(self, names: Iterable[str], stop: Event) -> None:
        """Read tensors into the operating system's page cache.

        Args:
            names: Names of dense tensors.
            stop: Ends the reading early when set.

        Raises:
            OSError: A file cannot be read any more.
        """
        chunk = memoryview(bytearray(CHUNK_BYTES))
        for name in names:
            parts = self.compressed[name].parts.values() if name in self.compressed else [name]
            for entry in (self.file_entries[part] for part in parts):
                with entry.file.open("rb", buffering=0) as file:
                    for offset in range(entry.start, entry.start + entry.nbytes, CHUNK_BYTES):
                        if stop.is_set():
                            return
                        file.seek(offset)
                        file.readinto(chunk)

    def _expand(self, name: str) -> Tensor:
        stored = self.compressed[name]
        mapped = self._map(stored.parts.values())
        parts = {part: mapped[tensor] for part, tensor in stored.parts.items()}
        shape = (stored.layout.outputs, stored.layout.inputs)
        if problem := stored.format.find_corruption(parts, shape):
            raise CheckpointError(
                f"{self.file_entries[stored.parts['weight']].file}: {name}: {problem}. It is "
                "corrupt, or another program wrote it."
            )
        weight = stored.format.expand(parts, stored.layout.inputs)
        return weight.T.contiguous() if stored.layout.transposed else weight

    def _map(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.file_entries[name].file, []).append(name)
        tensors = {}
        for file, file_names in by_file.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in file_names:
                        tensors[name] = opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file}: cannot be read any more ({error}). It was intact when the run began; "
                    "do not change it during a run."
                ) from error
        return tensors

    @cached_property
    def companions(self) -> list[Path]:
        """Small files beside the weights that a copy of the checkpoint needs."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.suffix in COMPANION_SUFFIXES
            and path.name not in {INDEX_FILE, "config.json", "report.json"}
        )

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors if stored dense."""
        return sum(entry.nbytes for entry in self.entries.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read ``config.json`` and the headers of a checkpoint, but no weights.

    Weights that prunekit compressed appear as the dense weights that they represent.

    Raises:
        CheckpointError: A file is missing, corrupt, or of an unsupported kind.
    """
    config = read_config(folder)
    storage = config.get("quantization_config")
    if isinstance(storage, dict) and storage.get("quant_method") == QUANT_METHOD:
        return with_compressed(folder, config, compressed_weights(folder, storage))
    for key, way_out in _REFUSED_CONFIGS.items():
        if config.get(key):
            raise CheckpointError(f"{folder / 'config.json'}: has {key!r}. {way_out}")
    entries = read_entries(folder)
    return Checkpoint(folder, config, entries, entries)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of ``config.json``.

    Raises:
        CheckpointError: The file is missing or not a JSON object.
    """
    return _read_json(folder / "config.json", "a Hugging Face checkpoint has one")


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a folder as stored in its files.

    Raises:
        CheckpointError: A file is missing, corrupt, or of an unsupported kind.
    """
    entries: dict[str, TensorEntry] = {}
    for file, names in _weight_files(folder).items():
        header = read_header(file)
        missing = names - header.keys() if names else set()
        if missing:
            raise CheckpointError(
                f"{file}: lacks {sorted(missing)[0]}, which {INDEX_FILE} places there."
            )
        entries |= {name: header[name] for name in names or header}
    return entries


def with_compressed(
    folder: Path, config: dict[str, Any], packed: dict[str, CompressedWeight]
) -> Checkpoint:
    """Return a checkpoint whose compressed weights appear as dense ones.

    Args:
        folder: Folder of the checkpoint.
        config: Content of its ``config.json``.
        packed: Compressed weights, by name of the dense weight.

    Raises:
        CheckpointError: A part of a compressed weight is missing.
    """
    files = read_entries(folder)
    entries = dict(files)
    for name, weight in packed.items():
        if missing := sorted(set(weight.parts.values()) - files.keys()):
            raise CheckpointError(f"{folder}: lacks {missing[0]}, a part of {name}.")
        for part in (*weight.parts.values(), *weight.metadata):
            entries.pop(part)
        first, shape = files[weight.parts["weight"]], weight.layout.shape
        size = shape[0] * shape[1] * first.dtype.itemsize
        entries[name] = TensorEntry(first.file, first.dtype, shape, size)
    entries = dict(sorted(entries.items()))
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    return Checkpoint(folder, config, entries, files, packed)


_REFUSED_CONFIGS = {
    "quantization_config": "Quantized weights cannot be pruned; start from the float checkpoint. "
    "Sparse weights of compressed-tensors: prunekit migrate makes them dense.",
    "sparsity_config": "Compressed sparse weights cannot be pruned; start from the dense ones, "
    "or make them dense: prunekit migrate.",
}


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Return the weight files with their tensors; an empty set means all."""
    if (folder / INDEX_FILE).is_file() and (shards := _shards(folder)):
        return shards
    if (folder / WEIGHTS_FILE).is_file():
        return {folder / WEIGHTS_FILE: set()}
    pickles = [path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"}]
    if pickles:
        raise CheckpointError(
            f"{folder}: holds {pickles[0]}, a pickle, which can run code when opened. Convert it "
            "once, if you trust it: AutoModel….from_pretrained(…).save_pretrained(…)."
        )
    raise CheckpointError(f"{folder}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}.")


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Return the files that the index lists, with the tensors of each."""
    index = _read_json(folder / INDEX_FILE, "it is the index of the shards")
    weight_map = index.get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / INDEX_FILE}: its weight_map is not a table of tensors.")
    files: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        file = folder / str(shard)
        if file.name != shard:
            raise CheckpointError(
                f"{folder / INDEX_FILE}: weight_map places {name} at {shard!r}, outside the folder."
            )
        # Unlike the method of Path, this does not raise on invalid file names.
        if not os.path.isfile(file):  # noqa: PTH113
            raise CheckpointError(f"{file}: is missing, but {INDEX_FILE} lists it.")
        files.setdefault(file, set()).add(name)
    return files


def _read_json(file: Path, why: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: is missing; {why}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: is not a JSON object.")
    return content
