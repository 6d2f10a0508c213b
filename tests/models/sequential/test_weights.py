"""Weights loaded from a checkpoint: names, prefetched tensors, adapters."""

import pytest
import torch
from transformers import AutoModel

from prunekit.checkpoint.adapter import Adapter
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import NumericsError
from prunekit.models.empty_model import empty_model
from prunekit.models.orientation import weight_matrix
from prunekit.models.sequential.weights import Weights, loaded_weights
from tests.support import checkpoints
from tests.support.architectures import tiny
from tests.support.blocks import outputs_block_by_block, outputs_of_whole

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


def test_what_was_fetched_to_the_device_is_what_is_loaded(llama, monkeypatch):
    checkpoint = open_checkpoint(llama)
    model = empty_model(checkpoint)
    weights, block = Weights(model, checkpoint, torch.float32, CPU), model.model.layers[1]
    name = "model.layers.1.mlp.up_proj.weight"
    monkeypatch.setattr(
        "prunekit.models.sequential.prefetch.Fetch.take",
        lambda self: {key: value + 1 for key, value in checkpoint.read(self.names).items()},
    )
    weights.fetch(block)
    weights.load(block)
    stored = checkpoint.read([name])[name]
    assert torch.equal(block.mlp.up_proj.weight, stored + 1)
    weights.load(block)  # the second load has no prefetched tensors
    assert torch.equal(block.mlp.up_proj.weight, stored)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_nan_outside_of_the_blocks_is_named_when_it_is_loaded(tmp_path, name):
    folder = checkpoints.write(tmp_path)

    def spoil(weight):
        weight.flatten()[-1] = torch.nan

    checkpoints.change(folder, name, spoil)
    checkpoint = open_checkpoint(folder)
    model = empty_model(checkpoint)
    weights = Weights(model, checkpoint, torch.float32, CPU)
    with pytest.raises(NumericsError, match=rf"model\.safetensors: {name}: 1 of its "):
        weights.load(model.get_submodule(name.removesuffix(".weight")))


def test_buffers_and_unused_tensors_may_hold_inf(llama):
    checkpoint = open_checkpoint(llama)
    weights = Weights(empty_model(checkpoint), checkpoint, torch.float32, CPU)
    weights.check_finite({"unused": torch.full((2,), torch.inf)})


def test_names_of_bare_prefixed_tied_and_old_checkpoints_are_found(tmp_path, ids):
    base = tiny("bert", AutoModel)
    old = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in base.state_dict().items()
    }
    folder = checkpoints.write(tmp_path / "old", "bert", head=AutoModel)
    checkpoints.save(folder, old)
    opened = open_checkpoint(folder)
    model = empty_model(opened)
    weights = Weights(model, opened, torch.float32, torch.device("cpu"))
    outputs, _ = outputs_block_by_block(model, [ids], weights)
    for (mine,), theirs in zip(outputs, outputs_of_whole(base, ids)[0], strict=True):
        assert torch.equal(mine, theirs)
    folder = checkpoints.write(tmp_path / "tied", "llama", tie_word_embeddings=True)
    opened = open_checkpoint(folder)
    assert "lm_head.weight" not in opened.entries
    stored = Weights(empty_model(opened), opened, torch.float32, torch.device("cpu")).stored
    assert stored["lm_head.weight"] == "model.embed_tokens.weight"


@torch.no_grad()
def test_adapters_are_added_and_dropped_weights_are_meta(llama):
    checkpoint = open_checkpoint(llama)
    model = empty_model(checkpoint)
    weights, linear = Weights(model, checkpoint, torch.float32, CPU), "model.layers.1.mlp.up_proj"
    module = model.get_submodule(linear)
    adapter = Adapter(torch.ones(len(module.weight), 1), torch.ones(1, module.weight.shape[1]))
    with loaded_weights(weights, module):
        plain = weight_matrix(module).clone()
    assert module.weight.is_meta
    weights.adapters = {linear: adapter}
    with loaded_weights(weights, module):
        assert torch.equal(weight_matrix(module), plain + 1)
