"""Checkpoints on disk: what is read, what is refused by its name, how it is written."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunekit.checkpoint.atomic import write_atomically, write_shard
from prunekit.checkpoint.header import read_header
from prunekit.checkpoint.hub import find
from prunekit.checkpoint.reader import INDEX, SINGLE, open_checkpoint
from prunekit.errors import CapacityError, CheckpointError
from prunekit.models.empty_model import empty_model
from prunekit.models.weight_names import stored_names
from tests.support import checkpoints

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The tiny Llama once in one file and once in shards."""
    folder = tmp_path_factory.mktemp("originals")
    checkpoints.write(folder / "single")
    checkpoints.write(folder / "sharded", shard_size="20KB")
    return folder


@pytest.fixture
def single(originals, tmp_path):
    return shutil.copytree(originals / "single", tmp_path / "single")


@pytest.fixture
def sharded(originals, tmp_path):
    return shutil.copytree(originals / "sharded", tmp_path / "sharded")


def rewrite_header(file, edit):
    """Rewrite the header of a safetensors file; ``edit`` changes the table or returns bytes."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    text = edit(header) or json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def rewrite_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_reads_every_tensor_as_it_is_stored(tmp_path, dtype, shard_size):
    folder = checkpoints.write(tmp_path, dtype=dtype, shard_size=shard_size)
    opened = open_checkpoint(folder)
    expected = checkpoints.tensors(folder)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    assert opened.entries.keys() == expected.keys()
    assert opened.nbytes == sum(tensor.nbytes for tensor in expected.values())
    found = opened.read(opened.entries)
    for name, tensor in expected.items():
        assert found[name].dtype == opened.entries[name].dtype == tensor.dtype
        assert opened.entries[name].shape == tuple(tensor.shape)
        assert torch.equal(found[name], tensor)
    assert {tensor.dtype for tensor in found.values()} == {dtype}


def test_reads_only_what_is_asked_for(sharded):
    opened = open_checkpoint(sharded)
    name = "model.layers.1.mlp.down_proj.weight"
    for file in {entry.file for entry in opened.entries.values()} - {opened.entries[name].file}:
        file.unlink()
    assert list(opened.read([name])) == [name]


def test_companions_are_what_a_copy_needs_and_no_weight(single):
    names = [path.name for path in open_checkpoint(single).companions]
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(names)
    assert not {"config.json", SINGLE, INDEX} & set(names)


def test_a_local_folder_is_found_before_the_hub_is_asked(single):
    assert find(str(single)) == single


def test_says_that_there_is_neither_a_folder_nor_a_repository():
    with pytest.raises(CheckpointError, match=r"^nobody/nothing: there is no such folder, and"):
        find("nobody/nothing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_refused_with_the_way_out(single, name):
    (single / SINGLE).rename(single / name)
    with pytest.raises(CheckpointError, match=rf"{name}, a pickle.*save_pretrained"):
        open_checkpoint(single)


def test_a_pickle_beside_safetensors_is_left_alone(single):
    (single / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    opened = open_checkpoint(single)
    assert {entry.file.name for entry in opened.entries.values()} == {SINGLE}


def test_a_folder_without_weights_is_refused(single):
    (single / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=rf"{single}: holds neither {SINGLE} nor {INDEX}"):
        open_checkpoint(single)


@pytest.mark.parametrize("place", ["../single/model.safetensors", "/etc/passwd", "sub/a"])
def test_an_index_that_leaves_the_folder_is_refused(sharded, place):
    def leave(index):
        index["weight_map"]["lm_head.weight"] = place

    rewrite_index(sharded, leave)
    with pytest.raises(CheckpointError, match=rf"{INDEX}: weight_map places lm_head.weight at"):
        open_checkpoint(sharded)


def test_an_index_that_is_no_table_is_refused(sharded):
    rewrite_index(sharded, lambda index: index.update(weight_map=[1]))
    with pytest.raises(CheckpointError, match=rf"{INDEX}: "):
        open_checkpoint(sharded)
    (sharded / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match=rf"{INDEX}: is not JSON"):
        open_checkpoint(sharded)


def test_a_missing_shard_is_named(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file}: is missing"):
        open_checkpoint(sharded)


def test_a_shard_that_lacks_a_tensor_is_named(sharded):
    file = sorted(sharded.glob("*.safetensors"))[0]
    held = load_file(file)
    name = sorted(held)[0]
    del held[name]
    save_file(held, file)
    with pytest.raises(CheckpointError, match=rf"{file}: lacks {name}"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_named(single, kept):
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=rf"{single / SINGLE}: .*(cut off|truncated)"):
        open_checkpoint(single)


@pytest.mark.parametrize(
    "text", [b"{", b"\xff\xfe\xfd", b"[]", b"3", b'{"a": 1}', b'{"a": {"dtype": "F32"}}']
)
def test_a_broken_header_is_named(single, text):
    rewrite_header(single / SINGLE, lambda _: text)
    with pytest.raises(CheckpointError, match=rf"{single / SINGLE}: .*header"):
        open_checkpoint(single)


BAD_OFFSETS = {
    "beyond the end": ("bytes", lambda a, b: a.update(shape=[10**6], data_offsets=[0, 4 * 10**6])),
    "too few bytes": ("bytes", lambda a, b: a.update(data_offsets=[0, 4])),
    "negative": ("bytes", lambda a, b: a.update(data_offsets=[-4, 4 * a["shape"][0] - 4])),
    "overlap": ("overlap", lambda a, b: a.update(data_offsets=b["data_offsets"])),
    "no numbers": ("header", lambda a, b: a.update(data_offsets=["x", "y"])),
    "three": ("header", lambda a, b: a.update(data_offsets=[0, 1, 2])),
    "unknown type": ("header", lambda a, b: a.update(dtype="F3")),
    "negative shape": ("(bytes|header)", lambda a, b: a.update(shape=[-32])),
    "shape of text": ("header", lambda a, b: a.update(shape=["32"])),
}


@pytest.mark.parametrize(("message", "edit"), BAD_OFFSETS.values(), ids=BAD_OFFSETS)
def test_offsets_that_cannot_be_are_refused(single, message, edit):
    norms = [f"model.layers.{block}.input_layernorm.weight" for block in range(2)]
    rewrite_header(single / SINGLE, lambda header: edit(*(header[name] for name in norms)))
    with pytest.raises(CheckpointError, match=rf"{single / SINGLE}: .*{message}"):
        open_checkpoint(single)


@pytest.mark.parametrize("key", ["quantization_config", "sparsity_config"])
def test_compressed_weights_are_refused(single, key):
    checkpoints.configure(single, **{key: {"format": "x"}})
    with pytest.raises(CheckpointError, match=rf"{single / 'config.json'}: has '{key}'"):
        open_checkpoint(single)


def test_a_missing_or_broken_config_is_named(single):
    for text, message in {"{": "is not JSON", "[]": "is not a JSON object"}.items():
        (single / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"config.json: {message}"):
            open_checkpoint(single)
    (single / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: is missing"):
        open_checkpoint(single)


@pytest.mark.parametrize("model_type", ["unheard_of", None])
def test_code_that_came_with_a_model_never_runs(single, model_type):
    ran = single / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass C: ...\n"
    (single / "configuration_x.py").write_text(code)
    (single / "modeling_x.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.C"}
    checkpoints.configure(single, model_type=model_type, auto_map=auto_map, trust_remote_code=True)
    with pytest.raises(CheckpointError, match=r"config.json: .*is never run"):
        empty_model(open_checkpoint(single))
    assert not ran.exists()


def test_a_known_model_type_is_built_from_stock_code_even_beside_other_code(single):
    (single / "modeling_x.py").write_text("raise SystemExit\n")
    checkpoints.configure(single, auto_map={"AutoModelForCausalLM": "modeling_x.C"})
    assert type(empty_model(open_checkpoint(single))).__module__.startswith("transformers.")


def test_an_unknown_class_is_named(single):
    checkpoints.configure(single, architectures=["LlamaForNothing"])
    with pytest.raises(CheckpointError, match=r"config.json: transformers .* has no 'LlamaForN"):
        empty_model(open_checkpoint(single))


def test_a_lacking_tensor_is_named(single):
    held = load_file(single / SINGLE)
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, single / SINGLE)
    opened = open_checkpoint(single)
    with pytest.raises(CheckpointError, match=rf"{single}: has no model.layers.1.mlp.up_proj"):
        stored_names(empty_model(opened), opened)


def test_a_config_of_another_size_is_refused(single):
    checkpoints.configure(single, intermediate_size=48)
    opened = open_checkpoint(single)
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: .* has shape .* belongs to another"):
        stored_names(empty_model(opened), opened)


def test_a_shard_reads_as_it_was_written(tmp_path):
    held = {"a": torch.randn(4, 6).T, "b": torch.arange(3), "c": torch.tensor(1.0).bfloat16()}
    write_shard(tmp_path / "a.safetensors", held)
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in held.items())
    assert read_header(tmp_path / "a.safetensors").keys() == held.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("failing", ["save_file", "os.fsync", "Path.replace"])
def test_a_shard_that_fails_leaves_what_was_there(tmp_path, monkeypatch, before, failing):
    file = tmp_path / "a.safetensors"
    if before:
        file.write_bytes(before)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"prunekit.checkpoint.atomic.{failing}", fail)
        with pytest.raises(CapacityError, match="disk is full"):
            write_shard(file, {"a": torch.zeros(3)})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_get_the_permissions_that_the_user_wants(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_shard(tmp_path / "a", {"a": torch.zeros(1)})
        write_atomically(tmp_path / "b", b"b")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~mask}
