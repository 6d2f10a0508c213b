"""LoRA adapters: per block, merged into one, and added to a weight."""

import json

import pytest
import torch

from prunekit.checkpoint import adapter
from prunekit.checkpoint.adapter import Adapter

BLOCKS = ["layers.0", "layers.1"]


@pytest.fixture
def adapters():
    torch.manual_seed(0)
    return {
        "layers.0.q": Adapter(torch.randn(6, 2), torch.randn(2, 4)),
        "layers.1.q": Adapter(torch.randn(6, 3), torch.randn(3, 4)),
    }


def merged(folder, adapters):
    """Write the adapters of each block and merge them; return the merged file."""
    files = {
        block: adapter.write_block(folder, block, {name: made})
        for block, (name, made) in zip(BLOCKS, adapters.items(), strict=True)
    }
    return adapter.merge(folder, files)


def test_blocks_are_merged_into_one_that_has_all(tmp_path, adapters):
    whole = merged(tmp_path, adapters)
    found = adapter.read(tmp_path)
    assert found.keys() == adapters.keys()
    for name, made in adapters.items():
        assert torch.equal(found[name].product, made.up @ made.down)
    assert adapter.read_block(whole, "layers.1").keys() == {"layers.1.q"}
    names = {path.relative_to(tmp_path).as_posix() for path in whole.parent.iterdir()}
    assert names == {*adapter.file_names(BLOCKS)} - {f"{adapter.FOLDER}/{adapter.CONFIG}"}


def test_the_config_has_the_rank_of_each_linear(tmp_path, adapters):
    merged(tmp_path, adapters)
    adapter.write_config(tmp_path, transposed=True)
    config = json.loads((tmp_path / adapter.FOLDER / adapter.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (3, 3, True)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"layers.0.q": 2}


def test_a_block_is_merged_from_the_file_that_is_named(tmp_path, adapters):
    """One block was pruned again after the merge; its own file then holds it."""
    whole = merged(tmp_path, adapters)
    before = whole.read_bytes()
    part = tmp_path / adapter.FOLDER / f"{BLOCKS[1]}.safetensors"
    part.with_name(f"{BLOCKS[0]}.safetensors").write_bytes(b"not named, so never opened")
    assert adapter.merge(tmp_path, {BLOCKS[0]: whole, BLOCKS[1]: part}).read_bytes() == before


def test_a_folder_without_adapters_has_none(tmp_path):
    assert adapter.read(tmp_path) == {}
