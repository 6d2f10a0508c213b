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


def test_blocks_are_merged_into_one_that_has_all(tmp_path, adapters):
    for block, (name, made) in zip(BLOCKS, adapters.items(), strict=True):
        adapter.write_block(tmp_path, block, {name: made})
    adapter.finish(tmp_path, BLOCKS, transposed=False)
    found = adapter.read(tmp_path)
    assert found.keys() == adapters.keys()
    for name, made in adapters.items():
        assert torch.equal(found[name].product, made.up @ made.down)
    assert adapter.read_block(tmp_path, "layers.1").keys() == {"layers.1.q"}
    files = {path.name for path in (tmp_path / adapter.FOLDER).iterdir()}
    assert files == {adapter.FILE, adapter.CONFIG}


def test_the_config_has_the_rank_of_each_linear(tmp_path, adapters):
    for block, (name, made) in zip(BLOCKS, adapters.items(), strict=True):
        adapter.write_block(tmp_path, block, {name: made})
    adapter.finish(tmp_path, BLOCKS, transposed=True)
    config = json.loads((tmp_path / adapter.FOLDER / adapter.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (3, 3, True)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"layers.0.q": 2}


def test_a_finished_adapter_is_finished_again_without_its_parts(tmp_path, adapters):
    for block, (name, made) in zip(BLOCKS, adapters.items(), strict=True):
        adapter.write_block(tmp_path, block, {name: made})
    adapter.finish(tmp_path, BLOCKS, transposed=False)
    before = (tmp_path / adapter.FOLDER / adapter.FILE).read_bytes()
    adapter.finish(tmp_path, BLOCKS, transposed=False)
    assert (tmp_path / adapter.FOLDER / adapter.FILE).read_bytes() == before


def test_a_folder_without_adapters_has_none(tmp_path):
    assert adapter.read(tmp_path) == {}
