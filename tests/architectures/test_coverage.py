"""Declarations with missing or nonexistent linears are refused by name."""

import pytest
import torch
from torch import nn

from prunekit.architectures import find_architecture
from prunekit.architectures.coverage import base_model_prefix, has_module, named_linears
from prunekit.errors import CheckpointError
from tests.support.architectures import tiny


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        (
            "mixtral",
            {},
            r"model\.layers\.0\.mlp\.experts\.gate_up_proj: fused experts \[4, 128, 32",
        ),
        (
            "qwen3_moe",
            {},
            r"model\.layers\.0\.mlp\.experts\.gate_up_proj: fused experts \[4, 32, 3",
        ),
        ("xlnet", {}, r"transformer\.layer\.0\.rel_attn\.q: several matrices in one weight \[32"),
        (
            "gpt2",
            {"add_cross_attention": True},
            r"transformer\.h\.0\.crossattention\.c_attn: no st",
        ),
    ],
)
def test_refuses_matrices_that_no_stage_covers(model_type, overrides, message):
    with pytest.raises(CheckpointError, match=message):
        find_architecture(tiny(model_type, **overrides))


def test_refuses_a_linear_that_no_stage_names():
    model = tiny("llama")
    model.model.layers[1].mlp.extra = nn.Linear(4, 4)
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1\.mlp\.extra: no stage"):
        find_architecture(model)


def test_refuses_a_block_without_a_named_linear():
    model = tiny("llama")
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1\.mlp\.up_proj: .* not have it"):
        find_architecture(model)


def test_refuses_fused_experts_of_a_declared_type():
    model = tiny("llama")
    model.model.layers[1].mlp.experts = nn.ParameterList([torch.zeros(2, 4, 4)])
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1\.mlp\.experts\.0: fused"):
        find_architecture(model)


def test_names_are_relative_to_the_module_and_prefixed_by_the_base_model():
    model = tiny("gpt2")
    assert base_model_prefix(model) == "transformer."
    assert base_model_prefix(model.base_model) == ""
    assert [*named_linears(model.transformer.h[0])] == [
        *("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert has_module(model, "transformer.h.1")
    assert not has_module(model, "transformer.h.2")
