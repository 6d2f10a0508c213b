"""Checkpoint folders: every tensor is read as stored, unsupported ones are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.checkpoint.weight_files import INDEX_FILE, WEIGHTS_FILE
from prunekit.errors import CheckpointError, NumericsError
from tests.support import checkpoints

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rewrite_index(folder, edit):
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


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
    assert not {"config.json", WEIGHTS_FILE, INDEX_FILE} & set(names)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_refused_with_the_way_out(single, name):
    (single / WEIGHTS_FILE).rename(single / name)
    with pytest.raises(CheckpointError, match=rf"{name}, a pickle.*save_pretrained"):
        open_checkpoint(single)


def test_a_pickle_beside_safetensors_is_left_alone(single):
    (single / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    opened = open_checkpoint(single)
    assert {entry.file.name for entry in opened.entries.values()} == {WEIGHTS_FILE}


def test_a_folder_without_weights_is_refused(single):
    (single / WEIGHTS_FILE).unlink()
    with pytest.raises(
        CheckpointError, match=rf"{single}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}"
    ):
        open_checkpoint(single)


@pytest.mark.parametrize("place", ["../single/model.safetensors", "/etc/passwd", "sub/a"])
def test_an_index_that_leaves_the_folder_is_refused(sharded, place):
    def leave(index):
        index["weight_map"]["lm_head.weight"] = place

    rewrite_index(sharded, leave)
    with pytest.raises(
        CheckpointError, match=rf"{INDEX_FILE}: weight_map places lm_head.weight at"
    ):
        open_checkpoint(sharded)


def test_an_index_that_is_no_table_is_refused(sharded):
    rewrite_index(sharded, lambda index: index.update(weight_map=[1]))
    with pytest.raises(CheckpointError, match=rf"{INDEX_FILE}: "):
        open_checkpoint(sharded)
    (sharded / INDEX_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=rf"{INDEX_FILE}: is not JSON"):
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


@pytest.mark.parametrize("key", ["quantization_config", "sparsity_config"])
def test_compressed_weights_are_refused(single, key):
    checkpoints.configure(single, **{key: {"format": "x"}})
    with pytest.raises(CheckpointError, match=rf"{single / 'config.json'}: has '{key}'"):
        open_checkpoint(single)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_weight_of_nan_or_inf_is_named(single, dtype, value):
    opened = open_checkpoint(single)
    weight = torch.full((4, 3), torch.finfo(dtype).max, dtype=dtype)
    weight[0] = torch.finfo(dtype).min
    opened.check_finite("lm_head.weight", weight)
    weight[2, 1] = float(value)
    with pytest.raises(NumericsError, match=rf"{WEIGHTS_FILE}: lm_head.weight: 1 of its 12 values"):
        opened.check_finite("lm_head.weight", weight)


def test_what_holds_no_weights_may_be_anything(single):
    opened = open_checkpoint(single)
    for value in (torch.zeros(0), torch.arange(3), torch.tensor([True]), torch.zeros(2).cfloat()):
        opened.check_finite("lm_head.weight", value)


def test_a_missing_or_broken_config_is_named(single):
    for text, message in {"{": "is not JSON", "[]": "is not a JSON object"}.items():
        (single / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"config.json: {message}"):
            open_checkpoint(single)
    (single / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: is missing"):
        open_checkpoint(single)
