"""Blocks and linears in pruning order, and float32 copies of weights."""

import pytest
import torch

from prunekit.architectures import find_architecture
from prunekit.errors import NumericsError, ShapeError
from prunekit.models.experts import unfuse
from prunekit.models.layout import (
    LinearSelection,
    is_causal_language_model,
    list_blocks,
    read_weight,
    stack_runners,
)
from prunekit.patterns import parse
from tests.support.architectures import tiny


def blocks_of(model, selection):
    return list_blocks(stack_runners(model, find_architecture(model)), selection)


def test_blocks_are_in_execution_order_with_their_linears_by_stage():
    first, *_, last = blocks_of(tiny("t5"), LinearSelection(parse("2:4")))
    assert (first.name, last.name) == ("encoder.block.0", "decoder.block.2")
    assert [linear.path for linear in first.stages[0]] == [
        f"layer.0.SelfAttention.{name}" for name in "qkv"
    ]
    # Linears that this config lacks are left out.
    assert [linear.path for linear in first.stages[2]] == ["layer.1.DenseReluDense.wi"]
    assert first.linears == tuple(linear for stage in first.stages for linear in stage)


def test_shapes_are_outputs_first_whatever_the_storage():
    block, _ = blocks_of(tiny("gpt2"), LinearSelection(parse("2:4")))
    up = next(linear for linear in block.linears if linear.path == "mlp.c_fc")
    assert (up.outputs, up.inputs, up.size) == (128, 32, 128 * 32)
    assert up.name == "transformer.h.0.mlp.c_fc"


def test_skipped_linears_carry_the_reason_and_are_not_pruned():
    selection = LinearSelection(parse("2:4"), skip=("*.0.mlp.*", "self_attn.o_proj"))
    first, second = blocks_of(tiny("llama"), selection)
    reasons = {linear.path: linear.skipped for linear in first.linears}
    assert reasons["mlp.down_proj"] == 'skip = "*.0.mlp.*"'
    assert reasons["self_attn.o_proj"] == 'skip = "self_attn.o_proj"'
    assert [linear.path for linear in first.pruned] == [
        f"self_attn.{name}_proj" for name in ("q", "k", "v")
    ]
    assert [len(stage) for stage in first.pruned_stages] == [3]
    assert [len(stage) for stage in second.pruned_stages] == [3, 2, 1]


def test_a_pattern_that_does_not_fit_is_an_error_or_a_reason_to_skip():
    model = tiny("llama", intermediate_size=62)
    with pytest.raises(ShapeError, match=r"layers\.0\.mlp\.down_proj: pattern .*\n.*layers\.1"):
        blocks_of(model, LinearSelection(parse("2:4")))
    blocks = blocks_of(model, LinearSelection(parse("2:4"), on_indivisible="skip"))
    skipped = [linear.path for block in blocks for linear in block.linears if linear.skipped]
    assert skipped == ["mlp.down_proj"] * 2


def test_linears_of_experts_name_their_expert():
    model = tiny("mixtral")
    unfuse(model)
    block, _ = blocks_of(model, LinearSelection(parse("2:4")))
    assert {linear.expert for linear in block.linears if "experts" in linear.path} == {
        f"mlp.experts.{number}" for number in range(4)
    }
    assert all(linear.expert is None for linear in block.linears if "attn" in linear.path)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_read_weight_is_a_float32_copy_outputs_first(model_type, dtype):
    model = tiny(model_type).to(dtype)
    runner, *_ = stack_runners(model, find_architecture(model))
    block, _ = blocks_of(model, LinearSelection(parse("2:4")))
    linear = block.linears[-1]
    module = runner.blocks[0].get_submodule(linear.path)
    stored = module.weight.T if model_type == "gpt2" else module.weight
    weight = read_weight(runner.blocks[0], linear)
    assert weight.dtype == torch.float32
    assert weight.is_contiguous()
    assert torch.equal(weight, stored.float())
    assert torch.equal(read_weight(runner.blocks[0], linear, slice(1, 3)), stored[1:3].float())
    weight.zero_()
    assert module.weight.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    model = tiny("llama")
    block, _ = blocks_of(model, LinearSelection(parse("2:4")))
    runner, *_ = stack_runners(model, find_architecture(model))
    with torch.no_grad():
        runner.blocks[0].mlp.up_proj.weight[5, :2] = value
    linear = next(linear for linear in block.linears if linear.path == "mlp.up_proj")
    message = r"layers\.0\.mlp\.up_proj: 2 of its weights are NaN or inf"
    with pytest.raises(NumericsError, match=message):
        read_weight(runner.blocks[0], linear, slice(0, 1))


def test_a_finite_weight_whose_sum_overflows_is_accepted():
    model = tiny("llama")
    block, _ = blocks_of(model, LinearSelection(parse("2:4")))
    runner, *_ = stack_runners(model, find_architecture(model))
    linear = block.linears[0]
    with torch.no_grad():
        runner.blocks[0].get_submodule(linear.path).weight.fill_(3e38)
    assert float(read_weight(runner.blocks[0], linear).min()) == pytest.approx(3e38)


@pytest.mark.parametrize(
    ("model_type", "causal"), [("llama", True), ("gpt2", True), ("bert", False), ("t5", False)]
)
def test_perplexity_is_defined_for_causal_language_models(model_type, causal):
    model = tiny(model_type)
    stacks = stack_runners(model, find_architecture(model))
    assert is_causal_language_model(model, stacks) == causal
