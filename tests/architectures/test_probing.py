"""Blocks and stages of undeclared model types, inferred from one forward pass."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from prunekit.architectures import Stack, Stage, find_architecture
from prunekit.architectures.llama import LLAMA
from prunekit.architectures.probing import probe
from prunekit.errors import CheckpointError
from prunekit.models.experts import unfused
from tests.support.architectures import (
    EXPERTS,
    TINY,
    UNDECLARED,
    WITHOUT_GATE,
    assert_stages_match_forward,
    tiny,
)
from tests.support.toy_model import Block, Toy


@pytest.mark.parametrize("model_type", sorted(TINY.keys() - {"t5"}))
def test_probing_agrees_with_the_declaration(model_type):
    model = tiny(model_type)
    probed = probe(model)
    assert probed.probed
    assert probed.model_types == (model_type,)
    (found,), (declared,) = probed.stacks, find_architecture(model).stacks
    units = {"attentions": (), "feed_forwards": ()}
    assert replace(found, **units) == replace(declared, **units)
    for feed_forward, theirs in zip(found.feed_forwards, declared.feed_forwards, strict=True):
        inputs = tuple(name for name in theirs.inputs if name in feed_forward.inputs)
        assert replace(feed_forward, inputs=()) == replace(theirs, inputs=())
        assert sorted(feed_forward.inputs) == sorted(inputs)
    # GPT-2's is a Conv1D; Phi-3's forward reads the number of heads in the config.
    assert len(found.attentions) == (model_type not in {"gpt2", "phi3"})
    for attention, theirs in zip(found.attentions, declared.attentions, strict=False):
        found_so = replace(attention, entries=(), emptiable=theirs.emptiable)
        assert found_so == replace(theirs, entries=())


@pytest.mark.parametrize("model_type", UNDECLARED)
def test_probing_of_an_undeclared_type_tells_the_truth(model_type):
    model = tiny(model_type)
    architecture = find_architecture(model)
    assert architecture.probed
    assert_stages_match_forward(model, architecture)


def test_probing_needs_no_weights():
    with torch.device("meta"):
        model = tiny("olmo2")
    with torch.inference_mode():
        assert find_architecture(model) == find_architecture(tiny("olmo2"))


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [*((model_type, {}) for model_type in EXPERTS), ("nemotron_h", WITHOUT_GATE)],
)
def test_stages_of_experts_are_those_of_a_forward_with_experts_as_linears(model_type, overrides):
    model = tiny(model_type, **overrides)
    fused = find_architecture(model)
    (stack,) = fused.stacks
    with unfused(model):
        assert find_architecture(model) == fused
        assert_stages_match_forward(model, fused)
        last = model.base_model.get_submodule(stack.blocks)[-1].get_submodule(stack.experts[0])
        linears = [name for name, _ in last.get_submodule("3").named_children()]
        assert linears == (["gate_proj"] * (not overrides) + ["up_proj", "down_proj"])


def test_a_linear_that_chooses_the_experts_is_left_dense():
    (stack,) = find_architecture(tiny("phimoe")).stacks
    assert stack.dense == (("mlp.router", "it chooses the experts"),)
    (stack,) = find_architecture(tiny("qwen2_moe")).stacks
    assert stack.dense == ()  # its router is no linear, the gate of its shared expert chooses none


def test_linears_that_are_not_called_once_are_left_dense():
    (stack,) = find_architecture(tiny("mamba")).stacks
    assert stack.dense == (("mixer.dt_proj", "a forward never calls it as a module"),)
    (stack,) = find_architecture(Twice(PreTrainedConfig())).stacks
    assert stack.dense == (("second", "it is called more than once in a forward"),)
    assert stack.stages == (Stage("first"), Stage("third"))


def test_of_a_model_with_towers_the_text_backbone_is_pruned():
    architecture = find_architecture(tiny("llava", AutoModelForImageTextToText))
    (stack,) = architecture.stacks
    assert stack.blocks == "language_model.layers"
    assert stack.stages == LLAMA.stacks[0].stages


def test_a_model_that_does_not_run_from_embeddings_runs_from_token_ids():
    for model_type in ("gemma4_text", "ctrl"):
        (stack,) = find_architecture(tiny(model_type)).stacks
        assert stack.reads_ids == (model_type == "gemma4_text")


def test_an_encoder_decoder_has_two_stacks():
    encoder, decoder = find_architecture(tiny("bart")).stacks
    assert (encoder.module, encoder.reads, encoder.depth) == ("encoder", None, "encoder_layers")
    assert (decoder.module, decoder.reads, decoder.depth) == (
        "decoder",
        "encoder",
        "decoder_layers",
    )
    queries, keys = "encoder_attn.q_proj", ("encoder_attn.k_proj", "encoder_attn.v_proj")
    assert Stage(*keys) in decoder.stages
    assert Stage(queries) in decoder.stages
    assert_stages_match_forward(tiny("bart"), find_architecture(tiny("bart")))


def test_experts_in_a_list_are_stages_each_and_their_router_is_dense():
    encoder, _ = find_architecture(tiny("switch_transformers")).stacks
    router = "layer.1.mlp.router.classifier"
    assert dict(encoder.dense)[router] == "it chooses the experts"
    sparse = encoder.varied[1]
    for number in range(4):
        expert = f"layer.1.mlp.experts.expert_{number}"
        assert {Stage(f"{expert}.wi"), Stage(f"{expert}.wo")} <= {*sparse}


def test_streams_beside_each_other_are_a_dimension_before_the_samples():
    (stack,) = find_architecture(tiny("gemma3n_text")).stacks
    assert (stack.sample_axis, stack.reads_ids) == (1, True)
    assert dict(stack.dense) == {
        "altup.modality_router": "it is called more than once in a forward"
    }


def test_blocks_of_several_classes_have_stages_of_their_own():
    (stack,) = find_architecture(tiny("jamba")).stacks
    mamba, attention = stack.varied[:2]
    assert mamba[0] == Stage("mamba.in_proj")
    assert attention[0] == Stage("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert attention[-2:] == (
        Stage("feed_forward.experts.*.gate_proj", "feed_forward.experts.*.up_proj"),
        Stage("feed_forward.experts.*.down_proj"),
    )


def test_linears_of_some_blocks_are_optional():
    (stack,) = find_architecture(tiny("lfm2")).stacks
    assert stack.optional == {
        *("conv.in_proj", "conv.out_proj", "self_attn.out_proj"),
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    }


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("albert", "no linear can be pruned: it is called more than once in a forward"),
    ],
)
def test_refuses_model_types_that_cannot_be_probed(model_type, message):
    with pytest.raises(CheckpointError, match=message):
        find_architecture(tiny(model_type))


class Backwards(Toy):
    def forward(self, inputs_embeds, use_cache):
        for block in reversed(self.blocks):
            inputs_embeds = block(inputs_embeds)
        return inputs_embeds


class TwoLists(Toy):
    def __init__(self, config):
        super().__init__(config)
        self.others = nn.ModuleList(Block() for _ in range(2))


class Lazy(Toy):
    def forward(self, inputs_embeds, use_cache):
        return self.blocks[1](self.blocks[0](inputs_embeds))


class ReadsNumbers(Toy):
    def forward(self, inputs_embeds, use_cache):
        return inputs_embeds if inputs_embeds.sum().item() else -inputs_embeds


class Blockless(Toy):
    def __init__(self, config):
        super().__init__(config)
        del self.blocks


class Looking(Toy):
    """A model whose blocks read the output of the first one beside the hidden states."""

    def forward(self, inputs_embeds, use_cache):
        first = inputs_embeds = self.blocks[0](inputs_embeds)
        for block in self.blocks[1:]:
            inputs_embeds = block(inputs_embeds, first * 2)
        return inputs_embeds

    class Block(Block):
        def forward(self, x, other=0):
            return super().forward(x + other)

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))


class Twice(Toy):
    """A model whose blocks call one of their linears twice."""

    class Block(Block):
        def forward(self, x):
            return super().forward(x) + self.second(x)

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))


class Uneven(Toy):
    """A model whose second block calls its linears in a different order."""

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(Uneven.Block(odd=index == 1) for index in range(3))

    class Block(nn.Module):
        def __init__(self, *, odd):
            super().__init__()
            self.odd = odd
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.first(self.second(x)) if self.odd else self.second(self.first(x))


class Sharing(Uneven):
    """A model whose second block calls one linear on a different tensor."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.forward = lambda x, block=block: (
                block.first(x) + block.second(x + 1 if block.odd else x)
            )


def test_blocks_that_call_their_linears_differently_have_stages_of_their_own():
    (stack,) = find_architecture(Uneven(PreTrainedConfig())).stacks
    one, other = (Stage("first"), Stage("second")), (Stage("second"), Stage("first"))
    assert stack.varied == (one, other, one)
    (stack,) = find_architecture(Sharing(PreTrainedConfig())).stacks
    together = (Stage("first", "second"),)
    assert stack.varied == (together, one, together)


def test_a_tensor_changed_in_place_starts_a_stage_and_a_view_does_not():
    architecture = find_architecture(Toy(PreTrainedConfig()))
    assert architecture.stacks == (Stack("blocks", (Stage("first"), Stage("second", "third"))),)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Backwards, r"not called in the order of their list: \[2, 1, 0\]"),
        (TwoLists, "one list of blocks, this model has blocks, others"),
        (Looking, r"before blocks\.1, .* reads outputs of earlier ones besides"),
        (Lazy, r"blocks\.2 was never called"),
        (ReadsNumbers, "without reading numbers"),
        (Blockless, "no ModuleList was found"),
    ],
)
def test_refuses_to_guess(model, message):
    with pytest.raises(CheckpointError, match=message) as refusal:
        find_architecture(model(PreTrainedConfig()))
    assert "Declare the family" in str(refusal.value)
