"""Convert checkpoints between formats, shard by shard, without running the model."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from prunekit.architectures.coverage import LINEAR_TYPES
from prunekit.checkpoint.atomic import json_bytes, write_atomically
from prunekit.checkpoint.compressed import CompressedWeight, compress_weight, layer_name
from prunekit.checkpoint.formats import Format, WeightLayout, format_named
from prunekit.checkpoint.journal import JOURNAL, START, read_journal
from prunekit.checkpoint.output import OutputFolder, check_same_tensors, checkpoint_files
from prunekit.checkpoint.output_path import check_apart, nearest_existing_folder
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint, with_compressed
from prunekit.checkpoint.weight_files import read_config, read_entries
from prunekit.errors import CapacityError, CheckpointError, ConfigError
from prunekit.models.empty_model import empty_model
from prunekit.models.memory import report_exhausted
from prunekit.models.orientation import stored_transposed
from prunekit.models.weight_names import stored_names
from prunekit.reports import report as reports

SHARD_BYTES = 2**30
"""Bytes of dense weights that are converted at once."""
LEGACY = {"sparse-24-bitmask": "2:4", "sparse-bitmask": "bitmask"}
"""Sparse formats of compressed-tensors up to 0.14 → our format with the same bytes."""
LEGACY_PARTS = {"weight": "compressed", "keep": "bitmask", "row_offsets": "row_offsets"}


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        folder: Output folder.
        linears: Layout of each compressed linear.
        dense: Reason for each linear that is stored dense.
        before: Bytes of all tensors in the source.
        after: Bytes of all tensors in the output.
        notes: Notes about files that were not copied.
    """

    folder: Path
    linears: dict[str, WeightLayout]
    dense: dict[str, str]
    before: int
    after: int
    notes: tuple[str, ...] = ()


@report_exhausted()
def convert(source: Path, target: Path, name: str) -> Conversion:
    """Write a checkpoint in another format without changing any weight value.

    Args:
        source: Folder of the checkpoint.
        target: Output folder, absent or empty.
        name: Name of the format.

    Raises:
        ConfigError: ``target`` is not empty, or there is no such format.
        CheckpointError: The source is invalid, or no linear of it fits the format.
    """
    return _convert(open_checkpoint(source), target, format_named(name))


@report_exhausted()
def migrate(source: Path, target: Path, name: str) -> Conversion:
    """Convert a sparse checkpoint of compressed-tensors to another format.

    compressed-tensors itself no longer supports its sparse formats.

    Args:
        source: Folder of the checkpoint.
        target: Output folder, absent or empty.
        name: Name of our format.

    Raises:
        ConfigError: ``target`` is not empty, or there is no such format.
        CheckpointError: The source is not such a checkpoint, or no linear of it fits the format.
    """
    return _convert(open_legacy(source), target, format_named(name))


def open_legacy(folder: Path) -> Checkpoint:
    """Open a checkpoint in a sparse format of compressed-tensors.

    Raises:
        CheckpointError: The format is not ``sparse-24-bitmask`` or ``sparse-bitmask``, weights are
            also quantized, or files are invalid.
    """
    config = read_config(folder)
    where, storage = folder / "config.json", _legacy_storage(config)
    sparsity = storage.get("sparsity_config") or storage
    layout = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
    if not isinstance(layout, str) or layout not in LEGACY:
        raise CheckpointError(
            f"{where}: names no sparse format of compressed-tensors (found {layout!r}; "
            f"known: {', '.join(LEGACY)}). For other checkpoints use prunekit convert."
        )
    if storage.get("config_groups"):
        raise CheckpointError(
            f"{where}: its weights are also quantized, which cannot be undone; start from the "
            "float checkpoint."
        )
    config = {
        key: value
        for key, value in config.items()
        if key not in {"sparsity_config", "compression_config", "quantization_config"}
    }
    packed = _legacy_weights(folder, config, format_named(LEGACY[layout]))
    return with_compressed(folder, config, packed)


def _legacy_storage(config: dict[str, Any]) -> dict[str, Any]:
    """Return the compressed-tensors config, whose key depends on the release."""
    for key in ("quantization_config", "compression_config"):
        if storage := config.get(key):
            return storage if isinstance(storage, dict) else {"sparsity_config": storage}
    return {"sparsity_config": config.get("sparsity_config") or {}}


def _legacy_weights(
    folder: Path, config: dict[str, Any], kind: Format
) -> dict[str, CompressedWeight]:
    files = read_entries(folder, config)
    layers = [name.removesuffix(".compressed") for name in files if name.endswith(".compressed")]
    if not layers:
        raise CheckpointError(f"{folder}: config.json says sparse, but no weight is compressed.")
    for layer in layers:
        if f"{layer}.weight" in files:
            raise CheckpointError(f"{folder}: holds {layer}.weight both dense and compressed.")
        if f"{layer}.shape" not in files or prod(files[f"{layer}.shape"].shape) != 2:
            raise CheckpointError(f"{folder}: {layer}.shape is missing, or is not two numbers.")
    shapes = Checkpoint(folder, {}, files, files).read([f"{layer}.shape" for layer in layers])
    packed = {}
    for layer in layers:
        sizes, kept = shapes[f"{layer}.shape"].flatten(), prod(files[f"{layer}.compressed"].shape)
        layout = WeightLayout.load([*sizes.tolist(), kept], f"{folder}: {layer}")
        parts = {part: f"{layer}.{LEGACY_PARTS[part]}" for part in kind.parts}
        packed[f"{layer}.weight"] = CompressedWeight(kind, layout, parts, (f"{layer}.shape",))
    return packed


def _convert(checkpoint: Checkpoint, target: Path, kind: Format) -> Conversion:
    existing = nearest_existing_folder(target, str(target))
    files = {entry.file for entry in checkpoint.file_entries.values()}
    check_apart(target, [checkpoint.folder, *files], str(target))
    job = f"convert {checkpoint.folder.absolute()} to {kind.name}"
    cut_off = _was_cut_off(target, job)
    if existing == target and any(target.iterdir()) and not cut_off:
        raise ConfigError(f"{target}: is not empty; choose another folder.")
    notes = tuple(checkpoint.check_copyable())
    linears = _linears(checkpoint)
    groups = list(_groups(checkpoint))
    output = OutputFolder(target, len(groups))
    writes = [*checkpoint_files(checkpoint), reports.JSON, reports.HTML]

    def complete(written: Checkpoint) -> None:
        check_same_tensors(checkpoint, written)
        _copy_report(checkpoint.folder, output)

    try:
        output.begin(job, resume=False, overwrite=cut_off, writes=writes)
        compressed, dense = _write(checkpoint, output, groups, linears, kind)
        output.finish(checkpoint, None, kind, compressed, complete)
        output.discard_journal()
    except BaseException:
        with suppress(OSError, CapacityError):
            output.discard()
            _remove_folders(target, existing)
        raise
    finally:
        output.close()
    before = sum(entry.nbytes for entry in checkpoint.file_entries.values())
    after = sum(entry.nbytes for entry in open_checkpoint(target).file_entries.values())
    return Conversion(target, compressed, dense, before, after, notes)


def _was_cut_off(target: Path, job: str) -> bool:
    """Return whether the folder holds the beginning of the same conversion."""
    journal = target / JOURNAL
    return journal.is_file() and read_journal(journal).get(START, {}).get("fingerprint") == job


def _remove_folders(target: Path, existing: Path) -> None:
    """Remove the folders that did not exist before."""
    for folder in [target, *target.absolute().parents]:
        if folder == existing:
            return
        folder.rmdir()


def _write(
    checkpoint: Checkpoint,
    output: OutputFolder,
    groups: list[list[str]],
    linears: dict[str, bool],
    kind: Format,
) -> tuple[dict[str, WeightLayout], dict[str, str]]:
    """Write the shards; return compressed layouts and reasons for dense linears."""
    compressed: dict[str, WeightLayout] = {}
    dense: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        tensors = {}
        for name, tensor in checkpoint.read(names).items():
            if name not in linears or kind.name == "dense":
                tensors[name] = tensor
                continue
            parts, stored = compress_weight(kind, name, tensor, transposed=linears[name])
            tensors |= parts
            if stored:
                compressed[layer_name(name)] = stored
            else:
                dense[layer_name(name)] = str(
                    kind.why_not_storable(tensor.T if linears[name] else tensor)
                )
        output.write_shard(number, tensors)
    if kind.name != "dense" and not compressed:
        why = next(iter(dense.items()), ("it", "has no linear layers"))
        raise CheckpointError(
            f"{checkpoint.folder}: nothing in it can be stored as {kind.name}. For one, {why[0]}: "
            f"{why[1]}."
        )
    return compressed, dense


def _copy_report(source: Path, output: OutputFolder) -> None:
    """Copy the report of the pruning run, with new file digests."""
    for name in (reports.JSON, reports.HTML):
        if not (source / name).is_file():
            continue
        content = (source / name).read_bytes()
        if name == reports.JSON:
            content = _with_digests(content, output.files)
        write_atomically(output.folder / name, content)


def _with_digests(content: bytes, digests: dict[str, str]) -> bytes:
    """Return ``report.json`` with other digests; unchanged if it is damaged."""
    try:
        report = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(report, dict):
        return content
    return json_bytes(report | {"files": digests})


def _linears(checkpoint: Checkpoint) -> dict[str, bool]:
    """Return the stored weight names of linears → whether they are transposed.

    Weights that are tied to another module are left out, since that module needs them dense.
    """
    model = empty_model(checkpoint)
    stored, uses = stored_names(model, checkpoint), {}
    for name in stored.values():
        uses[name] = uses.get(name, 0) + 1
    return {
        stored[f"{path}.weight"]: stored_transposed(module)
        for path, module in model.named_modules()
        if type(module) in LINEAR_TYPES and uses.get(stored.get(f"{path}.weight")) == 1
    }


def _groups(checkpoint: Checkpoint) -> Iterator[list[str]]:
    """Yield tensor names in file order, grouped into shards of SHARD_BYTES."""
    group, size = [], 0
    for name, entry in checkpoint.entries.items():
        if group and size + entry.nbytes > SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += entry.nbytes
    if group:
        yield group
