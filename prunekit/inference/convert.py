"""Checkpoints from one format to another, a few layers at a time, without running the model."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from prunekit.checkpoint.atomic import write_atomically
from prunekit.checkpoint.compressed import Packed, layer_of, pack
from prunekit.checkpoint.formats import Format, Stored, format_named
from prunekit.checkpoint.output import Output, nearest_folder
from prunekit.checkpoint.reader import (
    Checkpoint,
    open_checkpoint,
    read_config,
    read_entries,
    with_packed,
)
from prunekit.errors import CheckpointError, ConfigError
from prunekit.models.empty_model import empty_model
from prunekit.models.weight_names import stored_names
from prunekit.reports import report as reports

SHARD_BYTES = 2**30
"""Dense weights read, packed and written at a time."""
LEGACY = {"sparse-24-bitmask": "2:4", "sparse-bitmask": "bitmask"}
"""Sparse formats of compressed-tensors up to 0.14, by the format of ours with the same bytes."""
LEGACY_PARTS = {"weight": "compressed", "keep": "bitmask", "row_offsets": "row_offsets"}


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        folder: Where.
        linears: Layers that are compressed.
        dense: Linear layers that stay dense, with why.
        before: Bytes of all tensors as they were stored.
        after: Bytes of all tensors as they are now.
    """

    folder: Path
    linears: dict[str, Stored]
    dense: dict[str, str]
    before: int
    after: int


def convert(source: Path, target: Path, name: str) -> Converted:
    """Write a checkpoint in another format; no weight changes its value.

    Raises:
        ConfigError: ``target`` is in use, or ``name`` is no format.
        CheckpointError: The source is not sound, or nothing in it fits the format.
    """
    return _convert(open_checkpoint(source), target, format_named(name))


def migrate(source: Path, target: Path, name: str) -> Converted:
    """Write a sparse checkpoint of compressed-tensors, which has given it up, in a format of ours.

    Raises:
        ConfigError: ``target`` is in use, or ``name`` is no format.
        CheckpointError: The source is no such checkpoint, or nothing in it fits the format.
    """
    return _convert(open_legacy(source), target, format_named(name))


def open_legacy(folder: Path) -> Checkpoint:
    """Open a checkpoint of compressed-tensors in ``sparse-24-bitmask`` or ``sparse-bitmask``.

    Raises:
        CheckpointError: It is none, is quantized besides, or is not sound.
    """
    config = read_config(folder)
    where, storage = folder / "config.json", _legacy_storage(config)
    sparsity = storage.get("sparsity_config") or storage
    layout = sparsity.get("format")
    if layout not in LEGACY:
        raise CheckpointError(
            f"{where}: names no sparse format of compressed-tensors (found {layout!r}; "
            f"known: {', '.join(LEGACY)}). Other checkpoints: prunekit convert."
        )
    if storage.get("config_groups"):
        raise CheckpointError(
            f"{where}: its weights are quantized besides, which cannot be undone; start from the "
            "float checkpoint."
        )
    config = {
        key: value
        for key, value in config.items()
        if key not in {"sparsity_config", "compression_config", "quantization_config"}
    }
    return with_packed(folder, config, _legacy_weights(folder, format_named(LEGACY[layout])))


def _legacy_storage(config: dict[str, Any]) -> dict[str, Any]:
    """Return where compressed-tensors said it, which its releases put in three places."""
    for key in ("quantization_config", "compression_config"):
        if storage := config.get(key):
            return storage
    return {"sparsity_config": config.get("sparsity_config") or {}}


def _legacy_weights(folder: Path, kind: Format) -> dict[str, Packed]:
    from safetensors import safe_open

    files, packed = read_entries(folder), {}
    for name, entry in files.items():
        layer = name.removesuffix(".compressed")
        if layer == name:
            continue
        shape = f"{layer}.shape"
        if shape not in files:
            raise CheckpointError(f"{folder}: lacks {shape}, a part of {name}.")
        with safe_open(files[shape].file, framework="pt") as opened:
            outputs, inputs = opened.get_tensor(shape).flatten().tolist()
        parts = {part: f"{layer}.{LEGACY_PARTS[part]}" for part in kind.parts}
        kept = entry.nbytes // entry.dtype.itemsize
        packed[f"{layer}.weight"] = Packed(kind, Stored(outputs, inputs, kept), parts, (shape,))
    if not packed:
        raise CheckpointError(f"{folder}: says that it is sparse, but no weight of it is.")
    return packed


def _convert(checkpoint: Checkpoint, target: Path, kind: Format) -> Converted:
    existing = nearest_folder(target, str(target))
    if existing == target and any(target.iterdir()):
        raise ConfigError(f"{target}: is not empty; choose another folder.")
    linears = _linears(checkpoint)
    groups = list(_groups(checkpoint))
    target.mkdir(parents=True, exist_ok=True)
    output = Output(target, len(groups))
    try:
        compressed, dense = _write(checkpoint, output, groups, linears, kind)
        _keep_report(checkpoint.folder, target)
        output.finish(checkpoint, None, kind, compressed)
    except BaseException:
        with suppress(OSError):
            _remove(target, existing)
        raise
    before = sum(entry.nbytes for entry in checkpoint.files.values())
    after = sum(entry.nbytes for entry in open_checkpoint(target).files.values())
    return Converted(target, compressed, dense, before, after)


def _remove(target: Path, existing: Path) -> None:
    """Remove what was written to a folder that was empty, and the folders that were not there."""
    for file in target.iterdir():
        file.unlink()
    for folder in [target, *target.absolute().parents]:
        if folder == existing:
            return
        folder.rmdir()


def _write(
    checkpoint: Checkpoint,
    output: Output,
    groups: list[list[str]],
    linears: dict[str, bool],
    kind: Format,
) -> tuple[dict[str, Stored], dict[str, str]]:
    """Write the shards; return what is compressed, and why other linears are not."""
    compressed: dict[str, Stored] = {}
    dense: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        tensors = {}
        for name, tensor in checkpoint.read(names).items():
            if name not in linears or kind.name == "dense":
                tensors[name] = tensor
                continue
            parts, stored = pack(kind, name, tensor, transposed=linears[name])
            tensors |= parts
            if stored:
                compressed[layer_of(name)] = stored
            else:
                dense[layer_of(name)] = str(
                    kind.why_not_storable(tensor.T if linears[name] else tensor)
                )
        output.write(number, tensors)
    if kind.name != "dense" and not compressed:
        why = next(iter(dense.items()), ("it", "has no linear layers"))
        raise CheckpointError(
            f"{checkpoint.folder}: nothing in it can be stored as {kind.name}. For one, {why[0]}: "
            f"{why[1]}."
        )
    return compressed, dense


def _keep_report(source: Path, target: Path) -> None:
    """Copy the report of the run that pruned, so that the new folder can be proved too."""
    for name in (reports.JSON, reports.HTML):
        if (source / name).is_file():
            write_atomically(target / name, (source / name).read_bytes())


def _linears(checkpoint: Checkpoint) -> dict[str, bool]:
    """Return the weights of linear layers inside the model, and whether inputs come first in them.

    Not those that something else is tied to: the other would lose its weight.
    """
    model = empty_model(checkpoint)
    stored, uses = stored_names(model, checkpoint), {}
    for name in stored.values():
        uses[name] = uses.get(name, 0) + 1
    return {
        stored[f"{path}.weight"]: isinstance(module, Conv1D)
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and uses.get(stored.get(f"{path}.weight")) == 1
    }


def _groups(checkpoint: Checkpoint) -> Iterator[list[str]]:
    """Yield names of tensors, in the order of the files, as many at a time as a shard holds."""
    group, size = [], 0
    for name, entry in checkpoint.entries.items():
        if group and size + entry.nbytes > SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += entry.nbytes
    if group:
        yield group
