"""Checkpoints on disk: what is in one, its tensors by name, and shards written whole or not at all.

Only safetensors: reading a header reads no weight, and no code of the model's author runs.
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

from prunekit.checkpoint.compressed import METHOD, Packed, packed_weights
from prunekit.checkpoint.header import Entry, read_header
from prunekit.checkpoint.hub import KEPT_ENDINGS
from prunekit.errors import CheckpointError

CHUNK = 1 << 20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder whose headers were read and found sound.

    What is stored compressed shows as the dense weight that it stands for.

    Attributes:
        folder: Where it is.
        config: What ``config.json`` says, but for how weights are stored.
        entries: Tensors by name; those that are compressed with their dense shapes and sizes.
        files: Tensors as they lie in the files.
        packed: What is compressed, by the name of the dense weight.
        moved: Names of tensors that are given with their entries in another order, along an axis.
        order: That order.
    """

    folder: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    files: dict[str, Entry]
    packed: dict[str, Packed] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors on the CPU: mapped from the file, expanded from what it holds, or moved.

        Raises:
            CheckpointError: A compressed weight is not sound.
        """
        names = list(names)
        tensors = self._mapped([name for name in names if name not in self.packed])
        tensors |= {name: self._expanded(name) for name in names if name in self.packed}
        moved, order = self.moved.keys() & tensors, torch.tensor(self.order)
        return tensors | {
            name: tensors[name].index_select(self.moved[name], order) for name in moved
        }

    def warm(self, names: Iterable[str], stop: Event) -> None:
        """Read tensors into the system's cache of files, until ``stop`` is set.

        Raises:
            OSError: They are not there any more.
        """
        chunk = memoryview(bytearray(CHUNK))
        for name in names:
            parts = self.packed[name].parts.values() if name in self.packed else [name]
            for entry in (self.files[part] for part in parts):
                with entry.file.open("rb", buffering=0) as file:
                    for at in range(entry.start, entry.start + entry.nbytes, CHUNK):
                        if stop.is_set():
                            return
                        file.seek(at)
                        file.readinto(chunk)

    def _expanded(self, name: str) -> Tensor:
        packed = self.packed[name]
        mapped = self._mapped(packed.parts.values())
        parts = {part: mapped[stored] for part, stored in packed.parts.items()}
        shape = (packed.stored.outputs, packed.stored.inputs)
        if unsound := packed.format.find_corruption(parts, shape):
            raise CheckpointError(
                f"{self.files[packed.parts['weight']].file}: {name}: {unsound}. It is corrupt, or "
                "another program wrote it."
            )
        weight = packed.format.expand(parts, packed.stored.inputs)
        return weight.T.contiguous() if packed.stored.transposed else weight

    def _mapped(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name].file, []).append(name)
        tensors = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in wanted:
                        tensors[name] = opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file}: cannot be read any more ({error}). It was sound when the run began; "
                    "leave it alone while one runs."
                ) from error
        return tensors

    @cached_property
    def companions(self) -> list[Path]:
        """The small files beside the weights that a copy of the checkpoint needs."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.suffix in KEPT_ENDINGS
            and path.name not in {INDEX, "config.json", "report.json"}
        )

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors, dense."""
        return sum(entry.nbytes for entry in self.entries.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read ``config.json`` and the headers of a checkpoint; no weight is read.

    Weights that prunekit compressed show as the dense ones they stand for.

    Raises:
        CheckpointError: A file is missing, corrupt, or of a kind that is refused.
    """
    config = read_config(folder)
    storage = config.get("quantization_config")
    if isinstance(storage, dict) and storage.get("quant_method") == METHOD:
        return with_packed(folder, config, packed_weights(folder, storage))
    for key, way_out in _REFUSED_CONFIGS.items():
        if config.get(key):
            raise CheckpointError(f"{folder / 'config.json'}: has {key!r}. {way_out}")
    entries = read_entries(folder)
    return Checkpoint(folder, config, entries, entries)


def read_config(folder: Path) -> dict[str, Any]:
    """Return what ``config.json`` says.

    Raises:
        CheckpointError: It is missing or no JSON object.
    """
    return _read_json(folder / "config.json", "a Hugging Face checkpoint has one")


def read_entries(folder: Path) -> dict[str, Entry]:
    """Return the tensors of a folder as they lie in its files.

    Raises:
        CheckpointError: A file is missing, corrupt, or of a kind that is refused.
    """
    entries: dict[str, Entry] = {}
    for file, names in _files(folder).items():
        header = read_header(file)
        missing = names - header.keys() if names else set()
        if missing:
            raise CheckpointError(
                f"{file}: lacks {sorted(missing)[0]}, which {INDEX} places there."
            )
        entries |= {name: header[name] for name in names or header}
    return entries


def with_packed(folder: Path, config: dict[str, Any], packed: dict[str, Packed]) -> Checkpoint:
    """Return a checkpoint in which compressed weights show as the dense ones they stand for.

    Raises:
        CheckpointError: A part of a compressed weight is in no file.
    """
    files = read_entries(folder)
    entries = dict(files)
    for name, weight in packed.items():
        if missing := sorted(set(weight.parts.values()) - files.keys()):
            raise CheckpointError(f"{folder}: lacks {missing[0]}, a part of {name}.")
        for part in (*weight.parts.values(), *weight.hidden):
            entries.pop(part)
        first, shape = files[weight.parts["weight"]], weight.stored.shape
        size = shape[0] * shape[1] * first.dtype.itemsize
        entries[name] = Entry(first.file, first.dtype, shape, size)
    entries = dict(sorted(entries.items()))
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    return Checkpoint(folder, config, entries, files, packed)


_REFUSED_CONFIGS = {
    "quantization_config": "Quantized weights cannot be pruned; start from the float checkpoint. "
    "Sparse weights of compressed-tensors: prunekit migrate makes them dense.",
    "sparsity_config": "Compressed sparse weights cannot be pruned; start from the dense ones, "
    "or make them dense: prunekit migrate.",
}


def _files(folder: Path) -> dict[Path, set[str]]:
    """Return the weight files and which names each holds (empty: all it has)."""
    if (folder / INDEX).is_file() and (shards := _shards(folder)):
        return shards
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: set()}
    pickles = [path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"}]
    if pickles:
        raise CheckpointError(
            f"{folder}: holds {pickles[0]}, a pickle, which can run code when opened. Convert it "
            "once where you trust it: AutoModel….from_pretrained(…).save_pretrained(…)."
        )
    raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}.")


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Return the files that the index names, and which names it places in each."""
    index = _read_json(folder / INDEX, "it is the index of the shards")
    weight_map = index.get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / INDEX}: its weight_map is not a table of tensors.")
    files: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        file = folder / str(shard)
        if file.name != shard:
            raise CheckpointError(
                f"{folder / INDEX}: weight_map places {name} at {shard!r}, outside the folder."
            )
        # Unlike Path's, this one answers also for what no file can be called.
        if not os.path.isfile(file):  # noqa: PTH113
            raise CheckpointError(f"{file}: is missing, though {INDEX} names it.")
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
