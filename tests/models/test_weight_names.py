"""Names of parameters in a model and in its checkpoint."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.checkpoint.weight_files import WEIGHTS_FILE
from prunekit.errors import CheckpointError
from prunekit.models.empty_model import empty_model
from prunekit.models.weight_names import stored_names, unused_tensors
from tests.support import checkpoints
from tests.support.architectures import tiny


@pytest.fixture
def single(tmp_path):
    return checkpoints.write(tmp_path)


def test_a_missing_tensor_is_named(single):
    held = load_file(single / WEIGHTS_FILE)
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, single / WEIGHTS_FILE)
    opened = open_checkpoint(single)
    with pytest.raises(CheckpointError, match=rf"{single}: has no model.layers.1.mlp.up_proj"):
        stored_names(empty_model(opened), opened)


def test_a_config_of_another_size_is_refused(single):
    checkpoints.configure(single, intermediate_size=48)
    opened = open_checkpoint(single)
    with pytest.raises(
        CheckpointError, match=rf"{WEIGHTS_FILE}: .* has shape .* belongs to another"
    ):
        stored_names(empty_model(opened), opened)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_a_weight_of_a_type_that_nothing_computes_with_is_refused(single, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoints.change(single, name, lambda weight: weight.to(dtype))
    opened = open_checkpoint(single)
    stored = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS_FILE}: {name} is stored as {stored}\."):
        stored_names(empty_model(opened), opened)


def test_tied_weights_share_a_stored_name(tmp_path):
    checkpoint = open_checkpoint(checkpoints.write(tmp_path, "gpt2"))
    assert "lm_head.weight" not in checkpoint.entries
    stored = stored_names(empty_model(checkpoint), checkpoint)
    assert stored["lm_head.weight"] == stored["transformer.wte.weight"]


def test_a_model_with_a_head_finds_the_names_of_its_base_model(tmp_path):
    checkpoints.write(tmp_path, head=AutoModel)
    checkpoints.configure(tmp_path, architectures=["LlamaForCausalLM"], tie_word_embeddings=True)
    checkpoint = open_checkpoint(tmp_path)
    stored = stored_names(empty_model(checkpoint), checkpoint)
    name = "layers.0.self_attn.q_proj.weight"
    assert stored[f"model.{name}"] == name


def test_matrices_of_experts_map_to_their_linears(tmp_path):
    checkpoint = open_checkpoint(checkpoints.write(tmp_path, "mixtral"))
    stored = stored_names(empty_model(checkpoint), checkpoint)
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for ours, theirs in names.items():
        name = stored[f"model.layers.1.mlp.experts.3.{ours}.weight"]
        assert name.endswith(f"layers.1.block_sparse_moe.experts.3.{theirs}.weight")


def test_unused_tensors_are_those_without_a_parameter_and_of_the_given_widths(single):
    held = load_file(single / WEIGHTS_FILE)
    held |= {
        "extra.b": held["model.norm.weight"].clone(),
        "extra.a": held["model.norm.weight"][:5].clone(),
    }
    save_file(held, single / WEIGHTS_FILE, metadata={"format": "pt"})
    checkpoint = open_checkpoint(single)
    stored = stored_names(empty_model(checkpoint), checkpoint)
    assert [name for name, _ in unused_tensors(checkpoint, stored, {32})] == ["extra.b"]
    assert [name for name, _ in unused_tensors(checkpoint, stored, {5, 32})] == [
        *("extra.a", "extra.b")
    ]


def test_tensors_that_transformers_merges_are_named_where_nothing_says_how(tmp_path):
    checkpoint = open_checkpoint(checkpoints.write(tmp_path, "qwen2_moe"))
    with pytest.raises(CheckpointError, match=r"merges 4 of its tensors into .*down_proj"):
        stored_names(tiny("qwen2_moe"), checkpoint)  # whose experts are no linears
