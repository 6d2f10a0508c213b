"""Declarations with missing or nonexistent linears are refused by name."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from prunekit.architectures import find_architecture
from prunekit.architectures.coverage import (
    base_model_prefix,
    check_coverage,
    has_module,
    matrices_outside_linears,
    named_linears,
)
from prunekit.errors import CheckpointError
from tests.support.architectures import FUSED, tiny


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        (
            "jetmoe",
            {},
            r"model\.layers\.0\.mlp\.input_linear\.weight: JetMoeParallelExperts holds matrices"
            r" \[4, 128, 32\].* no has_gate, has_bias, is_transposed, is_concatenated",
        ),
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


def test_refuses_a_declared_type_with_most_weights_outside_of_its_linears():
    model = tiny("llama")
    model.model.layers[1].mlp.experts = nn.ParameterList([torch.zeros(2, 80, 80)])
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1\.mlp\.experts\.0: ParameterList"):
        find_architecture(model)


@pytest.mark.parametrize("model_type", FUSED)
def test_stages_of_experts_cover_their_fused_tensors(model_type):
    model = tiny(model_type)
    (stack,) = find_architecture(model).stacks
    assert stack.experts == ["mlp.experts"]
    with pytest.raises(CheckpointError, match=r"\.0\.mlp\.experts\.\*\.down_proj: no stage"):
        check_coverage(model, replace(stack, stages=stack.stages[:-1]))


def test_matrices_outside_of_linears_are_those_of_no_linear_embedding_or_known_expert():
    block = tiny("mixtral").model.layers[0]
    block.table, block.kernel = nn.Embedding(4, 4), nn.Conv1d(4, 4, 2)
    block.states = nn.Parameter(torch.zeros(4, 3))
    assert [*matrices_outside_linears(block)] == ["states", "mlp.gate.weight"]


def test_names_are_relative_to_the_module_and_prefixed_by_the_base_model():
    model = tiny("gpt2")
    assert base_model_prefix(model) == "transformer."
    assert base_model_prefix(model.base_model) == ""
    assert [*named_linears(model.transformer.h[0])] == [
        *("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert has_module(model, "transformer.h.1")
    assert not has_module(model, "transformer.h.2")
