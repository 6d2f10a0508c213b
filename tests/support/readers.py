"""Readers of untrusted files, with checks that must hold for any content.

A reader returns a value or raises one of prunekit's own errors, allocates no memory that the file
merely claims to need, runs no code, and opens nothing outside the file's folder. Tests with
hypothesis and with atheris share these checks.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from prunekit.checkpoint.compressed import compressed_weights, storage_config
from prunekit.checkpoint.formats import WeightLayout, format_named
from prunekit.checkpoint.header import TensorEntry, read_header
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint, with_compressed
from prunekit.checkpoint.weight_files import INDEX_FILE, WEIGHTS_FILE
from prunekit.config.load import load_config
from tests.conftest import ROOT
from tests.support import payloads, state_readers
from tests.support.watched import replace_file, result, unwatched

COMPRESSED = ("2:4", "bitmask")
STORED = WeightLayout(outputs=8, inputs=16, value_count=64)


def header(folder: Path, content: bytes) -> None:
    """Read a safetensors file, its tensors, and them as compressed weights."""
    file = folder / WEIGHTS_FILE
    replace_file(file, content)
    entries = result(folder, read_header, file) or {}
    for entry in entries.values():
        assert 8 <= entry.start <= entry.start + entry.nbytes <= len(content)
        assert all(type(size) is int and size >= 0 for size in entry.shape)
        assert entry.nbytes == prod(entry.shape) * entry.dtype.itemsize or not is_whole(entry)
    _read_all(folder, Checkpoint(folder, {}, entries, entries))
    for kind in COMPRESSED if entries else ():
        storage = storage_config(format_named(kind), {kind: STORED})
        packed = compressed_weights(folder, storage)
        if found := result(folder, with_compressed, folder, {}, packed):
            _read_all(folder, found)


def index(folder: Path, content: bytes) -> None:
    """Read the index of the shards in ``folder``."""
    replace_file(folder / INDEX_FILE, content)
    found = result(folder, open_checkpoint, folder)
    (folder / INDEX_FILE).unlink()
    for entry in found.entries.values() if found else ():
        assert entry.file.parent == folder


def model_config(folder: Path, content: bytes) -> None:
    """Read ``config.json`` and the weights in ``folder``."""
    replace_file(folder / "config.json", content)
    if found := result(folder, open_checkpoint, folder):
        _read_all(folder, found)


def model(folder: Path, content: bytes) -> None:
    """Build the empty model of a ``config.json`` beside Llama weights."""
    from prunekit.models.empty_model import empty_model
    from prunekit.models.weight_names import stored_names

    replace_file(folder / "config.json", content)
    if found := result(folder, open_checkpoint, folder):
        built = result(folder, empty_model, found)
        if built is not None:
            result(folder, stored_names, built, found)


def config(folder: Path, content: bytes) -> None:
    """Read a run config."""
    file = folder / "config.toml"
    replace_file(file, content)
    result(folder, load_config, file)


READERS: dict[str, Callable[[Path, bytes], None]] = {
    reader.__name__: reader for reader in (header, index, model_config, config, model)
} | {**payloads.READERS, **state_readers.READERS}


def is_whole(entry: TensorEntry) -> bool:
    """Return whether an element fills whole bytes, as all but three data types do."""
    return not entry.unreadable and entry.dtype != getattr(torch, "float4_e2m1fn_x2", None)


def _read_all(folder: Path, checkpoint: Checkpoint) -> None:
    tensors = result(folder, checkpoint.read, list(checkpoint.entries)) or {}
    for name, tensor in tensors.items():
        entry = checkpoint.entries[name]
        assert (tensor.dtype, tensor.nbytes) == (entry.dtype, entry.nbytes), name
        assert tensor.shape == entry.shape or not is_whole(entry), name


def warm(folder: Path, names: Iterable[str] = tuple(READERS)) -> None:
    """Read all seeds unwatched, so that later no library import is observed."""
    with unwatched():
        for name in names:
            for seed in sorted((folder / name / "seeds").iterdir()):
                READERS[name](folder / name / "files", seed.read_bytes())


def framed(table: bytes, length: int | None = None, data: bytes = b"\0" * 64) -> bytes:
    """Return a safetensors file with this header and claimed header length."""
    size = len(table) if length is None else length
    return size.to_bytes(8, "little") + table + data


def lay_out(folder: Path) -> None:
    """Create each reader's folder with required files and valid seeds."""
    from tests.support import checkpoints

    llama = checkpoints.write(folder / "llama", num_hidden_layers=1, shard_size="20KB")
    said, index = (llama / "config.json").read_bytes(), (llama / INDEX_FILE).read_bytes()
    for name in READERS:
        (folder / name / "files").mkdir(parents=True)
    for shard in llama.glob("*.safetensors"):
        for name in ("index", "model"):
            (folder / name / "files" / shard.name).symlink_to(shard)
    (folder / "index/files/config.json").write_bytes(said)
    (folder / "model/files" / INDEX_FILE).write_bytes(index)
    kinds = [checkpoints.tiny(kind).config for kind in ("llama", "mixtral", "gpt2", "t5")]
    models = [json.dumps(kind.to_diff_dict()).encode() for kind in kinds]
    weights, stored = _compressed(folder / "model_config/files" / WEIGHTS_FILE)
    seeds = {
        "header": weights,
        "index": [index],
        "model_config": [json.dumps(json.loads(said) | each).encode() for each in stored] + models,
        "config": [*_configs(folder / "config.toml")],
        "model": [said, *models],
    }
    for name in payloads.READERS:
        seeds[name] = [payloads.random_file(name, random.Random(seed)) for seed in range(8)]
    seeds |= state_readers.seeds(folder)
    for name, contents in seeds.items():
        (folder / name / "seeds").mkdir()
        for number, content in enumerate(contents):
            (folder / name / "seeds" / str(number)).write_bytes(content)


def _compressed(file: Path) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Write a weight in every compressed format into ``file``.

    Returns the content of cumulative files, and the config entry of each format.
    """

    from prunekit.checkpoint.compressed import compress_weight
    from prunekit.checkpoint.safetensors_writer import write_shard

    sparse = torch.ones(STORED.shape) * torch.tensor([1, 0, 1, 0]).repeat(4)
    held = {"norm.weight": torch.ones(3), "ids": torch.arange(4), "none": torch.ones(0)}
    alone, said = [], []
    for kind in COMPRESSED:
        parts, stored = compress_weight(
            format_named(kind), f"{kind}.weight", sparse, transposed=False
        )
        assert stored == STORED
        said.append({"quantization_config": storage_config(format_named(kind), {kind: STORED})})
        write_shard(file, held | parts)
        alone.append(file.read_bytes())
        held |= parts
    write_shard(file, held)
    return alone, said


def _configs(file: Path) -> Iterator[bytes]:
    """Yield the texts of configs, including the starter config."""
    from tests.distributed import configs

    for prune in (
        {"method": "sparsegpt", "pattern": "2:4"},
        {"method": "wanda", "pattern": "unstructured", "sparsity": 0.5, "allocation": "owl"},
        {"method": "magnitude", "pattern": ["heads"], "sparsity": 0.25},
    ):
        yield configs.write(file, Path("model"), Path("out"), prune=prune).read_bytes()
    yield (ROOT / "prunekit/cli/presets/starter.toml").read_bytes()
