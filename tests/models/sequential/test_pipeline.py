"""The main loop: one block in memory, bit-identical to the whole model."""

import pytest
import torch

from prunekit.architectures import find_architecture
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.models.empty_model import empty_model
from prunekit.models.layout import stack_runners
from prunekit.models.sequential.pipeline import iterate_blocks, load_blocks, split_batches
from prunekit.models.sequential.weights import Weights
from tests.support import checkpoints
from tests.support.architectures import TINY, tiny
from tests.support.blocks import loaded_blocks, outputs_block_by_block, outputs_of_whole
from tests.support.tiers import DISTINCT, often


def test_samples_are_cut_into_batches_of_about_equal_tokens():
    parts = split_batches(torch.zeros(10, 512, dtype=torch.int64), torch.device("cpu"))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert len(split_batches(torch.zeros(2, 5000, dtype=torch.int64), torch.device("cpu"))) == 2


@pytest.mark.parametrize("model_type", often([*TINY, "modernbert", "bloom"], {*DISTINCT, "bloom"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_from_a_checkpoint_gives_the_bits_of_a_loaded_model(
    tmp_path, ids, model_type, dtype
):
    folder = checkpoints.write(tmp_path, model_type, dtype)
    opened = open_checkpoint(folder)
    model = empty_model(opened)
    weights = Weights(model, opened, torch.float32, torch.device("cpu"))
    outputs, _ = outputs_block_by_block(model, [ids], weights)
    loaded = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    for (mine,), theirs in zip(outputs, outputs_of_whole(loaded, ids)[0], strict=True):
        assert torch.equal(mine, theirs)


def test_only_one_block_has_weights_at_a_time(tmp_path, ids):
    opened = open_checkpoint(checkpoints.write(tmp_path, num_hidden_layers=3))
    model = empty_model(opened)
    weights = Weights(model, opened, torch.float32, torch.device("cpu"))
    for visit in iterate_blocks(
        model, stack_runners(model, find_architecture(model)), weights, [ids]
    ):
        for block in visit.runner.blocks:
            real = {not parameter.is_meta for parameter in block.parameters()}
            assert real == {block is visit.module}
        assert model.lm_head.weight.is_meta
        assert model.model.embed_tokens.weight.is_meta
    assert all(block.mlp.up_proj.weight.is_meta for block in model.model.layers)


def test_numbered_blocks_are_loaded_without_hidden_states(tmp_path):
    opened = open_checkpoint(checkpoints.write(tmp_path, num_hidden_layers=3))
    model = empty_model(opened)
    weights = Weights(model, opened, torch.float32, torch.device("cpu"))
    stacks, names = stack_runners(model, find_architecture(model)), []
    for loaded in load_blocks(stacks, weights, {2, 0}):
        names.append(loaded.name)
        assert not any(parameter.is_meta for parameter in loaded.module.parameters())
        assert not loaded.hidden
    assert names == ["model.layers.0", "model.layers.2"]


def test_the_next_block_reads_the_output_of_the_changed_one(ids):
    model = tiny("llama")
    for loaded in loaded_blocks(model, ids):
        if loaded.index == 0:
            with torch.no_grad():
                loaded.module.mlp.down_proj.weight.zero_()
                expected = [call() for call in loaded.calls()]
        else:
            assert all(map(torch.equal, loaded.hidden, expected))
