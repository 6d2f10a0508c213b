"""Read Hugging Face checkpoint folders: config, headers, tensors by name.

Only safetensors is supported: headers can be read without weights, and no code from the
checkpoint is executed.
"""

import errno
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunekit.checkpoint.atomic import error_number
from prunekit.checkpoint.companions import companion_notes, companions
from prunekit.checkpoint.compressed import QUANT_METHOD, CompressedWeight, compressed_weights
from prunekit.checkpoint.header import FLOAT_DTYPES, TensorEntry
from prunekit.checkpoint.parts import (
    TensorPart,
    find_part,
    is_whole,
    joined_shape,
    whole_tensors,
)
from prunekit.checkpoint.quantized import quantized_weights, unused_scales
from prunekit.checkpoint.quantized_weight import QuantizedWeight
from prunekit.checkpoint.views import TensorView, read_views, stored_tensors
from prunekit.checkpoint.weight_files import WEIGHTS_KEY, read_config, read_entries
from prunekit.errors import CheckpointError, NumericsError
from prunekit.formatting import size

CHUNK_BYTES = 1 << 20


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
        views: Tensors that are computed from stored ones when read, by name.
        quantized: Weights stored in few bits, by name.
        expands_to: Type as which weights in few bits are read; None for that of their entries.
        on_read: Called with name and value, as stored, of each tensor that is read.
    """

    folder: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    file_entries: dict[str, TensorEntry]
    compressed: dict[str, CompressedWeight] = field(default_factory=dict)
    views: Mapping[str, TensorView] = field(default_factory=dict)
    quantized: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    expands_to: torch.dtype | None = None
    on_read: Callable[[str, Tensor], None] | None = None

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return dense tensors and parts of tensors on the CPU, by name.

        They are memory-mapped, except compressed ones, which are expanded, and views.

        Raises:
            CheckpointError: A compressed weight is corrupt, or a data type is not one of torch.
        """
        asked, names = list(names), whole_tensors(names)
        stored = stored_tensors(names, self.views)
        packed = self.compressed.keys() | self.quantized.keys()
        tensors = self._map([name for name in stored if name not in packed])
        tensors |= {name: self._expand(name) for name in stored if name in packed}
        tensors = read_views(names, self.views, tensors)
        found = ((name, find_part(tensors, name)) for name in asked)
        return {name: value for name, value in found if value is not None}

    def entry(self, name: str) -> TensorEntry | None:
        """Return the entry of a tensor, part or join, or None."""
        if is_whole(name):
            return self.entries.get(name)
        entries = [self.entries.get(each) for each in whole_tensors([name])]
        found = [entry for entry in entries if entry]
        if len(found) < len(entries) or len({entry.dtype for entry in found}) > 1:
            return None
        part, whole = TensorPart.parse(name), found[0]
        shapes = [entry.shape for entry in found]
        shape = part.shape(whole.shape) if part else joined_shape(shapes)
        if shape is None:
            return None
        return replace(whole, shape=shape, nbytes=math.prod(shape) * whole.dtype.itemsize)

    def warm_page_cache(self, names: Iterable[str], stop: Event) -> None:
        """Read tensors into the operating system's page cache.

        Args:
            names: Names of dense tensors.
            stop: Ends the reading early when set.

        Raises:
            OSError: A file cannot be read any more.
        """
        chunk = memoryview(bytearray(CHUNK_BYTES))
        for name in stored_tensors(whole_tensors(names), self.views):
            for entry in (self.file_entries[part] for part in self._stored_parts(name)):
                with entry.file.open("rb", buffering=0) as file:
                    for offset in range(entry.start, entry.start + entry.nbytes, CHUNK_BYTES):
                        if stop.is_set():
                            return
                        file.seek(offset)
                        file.readinto(chunk)

    def _stored_parts(self, name: str) -> Iterable[str]:
        if name in self.compressed:
            return self.compressed[name].parts.values()
        weight = self.quantized.get(name)
        return weight.stored if weight else [name]

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Refuse a weight that holds NaN or inf.

        Args:
            name: Name of the tensor.
            tensor: Its values, on any device.

        Raises:
            NumericsError: It holds NaN or inf.
        """
        if tensor.dtype not in FLOAT_DTYPES or not tensor.numel():
            return
        # An extreme is NaN or inf if any value is; checking each takes over ten times as long.
        low, high = tensor.aminmax()
        if (low * 0 + high * 0) == 0:
            return
        count = int((~tensor.isfinite()).sum())
        whole, *_ = whole_tensors([name])
        raise NumericsError(
            f"{self.entries[whole].file}: {name}: {count} of its {tensor.numel()} values are NaN "
            "or inf. The checkpoint is broken; download or save it again."
        )

    def _expand(self, name: str) -> Tensor:
        if weight := self.quantized.get(name):
            return weight.dense(self._map(weight.stored), self.expands_to)
        stored = self.compressed[name]
        file = self.file_entries[stored.parts["weight"]].file
        return stored.expand(f"{file}: {name}", self._map(stored.parts.values()), self.expands_to)

    def _map(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            self._check_readable(name)
            by_file.setdefault(self.file_entries[name].file, []).append(name)
        tensors = {}
        for file, file_names in by_file.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in file_names:
                        tensors[name] = opened.get_tensor(name)
                        if self.on_read:
                            self.on_read(name, tensors[name])
            except (SafetensorError, OSError) as error:
                if error_number(error) == errno.ENOMEM:
                    raise MemoryError(f"{file}: {error}") from error
                raise CheckpointError(
                    f"{file}: cannot be read any more ({error}). It was intact when the run began; "
                    "do not change it during a run."
                ) from error
        return tensors

    def _check_readable(self, name: str) -> None:
        entry = self.file_entries[name]
        if entry.unreadable:
            raise CheckpointError(
                f"{entry.file}: {name}: has the data type {entry.unreadable}, which torch "
                f"{torch.__version__} does not have, so it cannot be read."
            )

    @cached_property
    def companions(self) -> list[Path]:
        """Small files beside the weights that a copy of the checkpoint needs.

        Raises:
            CheckpointError: One of them cannot be read.
        """
        return companions(self.folder)

    @property
    def companion_names(self) -> dict[str, Path]:
        """The companions by their names relative to the folder."""
        return {path.relative_to(self.folder).as_posix(): path for path in self.companions}

    def check_copyable(self) -> list[str]:
        """Check that all tensors and companions can be read.

        Returns notes about the other files, and about weights that are written in another type.

        Raises:
            CheckpointError: A companion or the data type of a tensor cannot be read.
        """
        for name in self.file_entries:
            self._check_readable(name)
        files = {entry.file for entry in self.file_entries.values()}
        notes = [*companion_notes(self.folder, files.union(self.companions))]
        if self.quantized:
            stored = sum(entry.nbytes for entry in self.file_entries.values())
            notes.append(
                f"{len(self.quantized)} weights are stored in few bits and are read, and written, "
                f"as floats: {size(self.nbytes)} instead of {size(stored)}."
            )
        return notes

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
    return open_weights(folder, read_config(folder))


def open_weights(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """Read the headers of a checkpoint with a given ``config.json``.

    No weights are read.

    Raises:
        CheckpointError: A file is missing, corrupt, or of an unsupported kind.
    """
    storage = config.get("quantization_config")
    if isinstance(storage, dict) and storage.get("quant_method") == QUANT_METHOD:
        return with_compressed(folder, config, compressed_weights(folder, storage))
    if config.get("sparsity_config"):
        raise CheckpointError(
            f"{folder / 'config.json'}: has 'sparsity_config'. Compressed sparse weights cannot be "
            "pruned; start from the dense ones, or make them dense: prunekit migrate."
        )
    if storage:
        return _with_quantized(folder, config, storage if isinstance(storage, dict) else {})
    entries = read_entries(folder, config)
    # The key says how these weights are stored, and nothing about a copy of them.
    config = {key: value for key, value in config.items() if key != WEIGHTS_KEY}
    return Checkpoint(folder, config, entries, entries)


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
    files = read_entries(folder, config)
    entries = dict(files)
    for name, weight in packed.items():
        weight.check_entries(folder, name, files)
        for part in (*weight.parts.values(), *weight.metadata):
            entries.pop(part)
        first, shape = files[weight.parts[weight.format.typed_by]], weight.layout.shape
        nbytes = shape[0] * shape[1] * first.dtype.itemsize
        entries[name] = TensorEntry(first.file, first.dtype, shape, nbytes)
    entries = dict(sorted(entries.items()))
    storage = {"quantization_config", WEIGHTS_KEY}
    config = {key: value for key, value in config.items() if key not in storage}
    return Checkpoint(folder, config, entries, files, packed)


def _with_quantized(folder: Path, config: dict[str, Any], storage: dict[str, Any]) -> Checkpoint:
    """Return a checkpoint whose quantized weights appear as dense ones."""
    files = read_entries(folder, config)
    found = quantized_weights(folder, storage, files)
    parts = {*unused_scales(files)}.union(*(weight.stored for weight in found.values()))
    entries = {name: entry for name, entry in files.items() if name not in parts}
    entries |= {name: weight.entry(files) for name, weight in found.items()}
    dropped = {"quantization_config", WEIGHTS_KEY}
    config = {key: value for key, value in config.items() if key not in dropped}
    return Checkpoint(folder, config, dict(sorted(entries.items())), files, quantized=found)
