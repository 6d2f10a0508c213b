"""The weight files of a folder: the choice is that of transformers."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.checkpoint.weight_files import INDEX_FILE, WEIGHTS_FILE, read_json, shard_names
from prunekit.errors import CheckpointError
from tests.support import checkpoints

NORM = "model.norm.weight"


def shard(folder, name, value, extra=(), held=None):
    """Write all weights of a folder again, with another final norm."""
    held = held or load_file(folder / "first.safetensors")
    held = held | {NORM: torch.full_like(held[NORM], value)} | dict(extra)
    save_file(held, folder / name, metadata={"format": "pt"})
    return held


def index(folder, name, held):
    content = {"metadata": {}, "weight_map": dict.fromkeys(held, name)}
    (folder / INDEX_FILE).write_text(json.dumps(content))


@pytest.fixture
def folder(single):
    """A checkpoint without weights under a name that transformers looks for."""
    (single / WEIGHTS_FILE).rename(single / "first.safetensors")
    return single


def same_as_transformers(folder):
    """Return the final norm, after checking that transformers opens the same."""
    model, opened = LlamaForCausalLM.from_pretrained(folder), open_checkpoint(folder)
    for name, value in model.state_dict().items():
        if name in opened.entries:
            assert torch.equal(opened.read([name])[name], value), name
    return float(opened.read([NORM])[NORM][0])


def test_a_single_file_comes_before_an_index(folder):
    index(folder, "b.safetensors", shard(folder, "b.safetensors", 2.0))
    assert same_as_transformers(folder) == 2
    shard(folder, WEIGHTS_FILE, 3.0)
    assert same_as_transformers(folder) == 3


def test_a_file_that_the_config_names_comes_before_all(folder):
    index(folder, "b.safetensors", shard(folder, "b.safetensors", 2.0))
    shard(folder, WEIGHTS_FILE, 3.0)
    shard(folder, "c.safetensors", 4.0)
    checkpoints.configure(folder, transformers_weights="c.safetensors")
    assert same_as_transformers(folder) == 4
    assert "transformers_weights" not in open_checkpoint(folder).config
    checkpoints.configure(folder, transformers_weights=INDEX_FILE)
    assert same_as_transformers(folder) == 2


def test_all_tensors_of_listed_shards_count_and_the_last_of_a_name(folder):
    held = shard(folder, "b.safetensors", 2.0, {"more": torch.ones(2)})
    shard(folder, "a.safetensors", 5.0, held={NORM: held[NORM]})
    weight_map = dict.fromkeys(held, "b.safetensors") | {NORM: "a.safetensors"}
    del weight_map["more"]
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same_as_transformers(folder) == 2
    assert "more" in open_checkpoint(folder).entries


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a.bin", 3, ["a"]])
def test_a_config_that_names_other_files_is_refused(folder, name):
    checkpoints.configure(folder, transformers_weights=name)
    with pytest.raises(CheckpointError, match=r"config.json: transformers_weights names"):
        open_checkpoint(folder)


def test_a_file_that_the_config_names_is_not_replaced_by_another(folder):
    shard(folder, WEIGHTS_FILE, 3.0)
    checkpoints.configure(folder, transformers_weights="c.safetensors")
    with pytest.raises(CheckpointError, match=r"c\.safetensors: is missing, but transformers_weig"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "place", ["../a", "/etc/passwd", "a/b", "a\0b", "\0", "", ".", "..", "x" * 300, 3, None, ["a"]]
)
def test_an_index_names_files_in_its_folder(folder, place):
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {NORM: place}}))
    with pytest.raises(CheckpointError, match=r"(outside the folder|is missing, but)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": {"a": "first"}}])
def test_an_index_without_the_weights_is_refused(folder, content):
    (folder / INDEX_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"(lists no tensor|is missing, but)"):
        open_checkpoint(folder)


def test_a_large_index_is_read_once(folder):
    held = load_file(folder / "first.safetensors")
    many = {f"t{number}": torch.zeros(0) for number in range(20_000)}
    save_file(held | many, folder / "first.safetensors", metadata={"format": "pt"})
    index(folder, "first.safetensors", held | many)
    assert len(open_checkpoint(folder).entries) == len(held) + len(many)
    assert len(shard_names(folder / INDEX_FILE)) == len(held) + len(many)


def test_links_of_a_hub_cache_are_weights(folder, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    index(folder, "b.safetensors", shard(folder, "b.safetensors", 2.0))
    for number, name in enumerate(("config.json", INDEX_FILE, "b.safetensors")):
        (folder / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert same_as_transformers(snapshot) == 2


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("gone")])
def test_what_is_no_file_is_not_read(tmp_path, make):
    make(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match=r"a\.json: is not a file, or a link to nothing; why"):
        read_json(tmp_path / "a.json", "why")


def test_a_huge_json_file_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(CheckpointError, match=r"a\.json: has over 100,000,000 bytes; why"):
        read_json(tmp_path / "a.json", "why")


@pytest.mark.parametrize(("depth", "refused"), [(64, False), (65, True), (900, True)])
def test_a_config_that_nests_deeper_than_any_is_refused(tmp_path, depth, refused):
    """Python cannot write all that it reads, and would fail when the output is finished."""
    file = tmp_path / "config.json"
    file.write_text('{"a": ' * depth + "1" + "}" * depth)
    if not refused:
        assert read_json(file, "a test") == json.loads(file.read_text())
        return
    with pytest.raises(CheckpointError, match="nests tables and lists over 64 deep"):
        read_json(file, "a test")
