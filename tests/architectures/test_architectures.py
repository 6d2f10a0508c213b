from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    T5EncoderModel,
)

from prunekit import architectures
from prunekit.architectures import Architecture, Stack, Stage, find, names
from prunekit.architectures.coverage import linears, prefix
from prunekit.architectures.probing import probe
from prunekit.errors import CheckpointError
from tests.support.architectures import FUSED, TINY, UNDECLARED, tiny

HEADS = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
VARIANTS = [
    *((model_type, {}) for model_type in TINY),
    ("opt", {"word_embed_proj_dim": 16}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("t5", {"feed_forward_proj": "gated-gelu"}),
]


def assert_tells_the_truth(model: PreTrainedModel, architecture: Architecture) -> None:
    """Run every stack from embeddings: linears grouped by the tensor they read are its stages.

    Groups are in the order of their first call, names in the order of the calls.
    """
    base, last = model.base_model, {}
    for stack in architecture.stacks:
        calls = watch(base.get_submodule(stack.blocks))
        embeddings = torch.randn(2, 5, model.get_input_embeddings().weight.shape[1])
        context = {"encoder_hidden_states": last[stack.reads]} if stack.reads else {}
        module = base.get_submodule(stack.module)
        with torch.no_grad():
            out = module(inputs_embeds=embeddings, use_cache=False, **context)
        last[stack.module] = out.last_hidden_state
        for block, reads in zip(base.get_submodule(stack.blocks), calls, strict=True):
            groups: dict[int, list[str]] = {}
            for name, x in reads:
                groups.setdefault(id(x), []).append(name)
            stages = stack.stages_of(name for name, _ in block.named_modules())
            named = [[name for name in stage.linears if name in linears(block)] for stage in stages]
            assert list(groups.values()) == [stage for stage in named if stage]
            assert sorted(name for name, _ in reads) == sorted(linears(block))


def watch(blocks: nn.Module) -> list[list[tuple[str, torch.Tensor]]]:
    """Return, per block, what its linears will be called with, in call order."""
    calls = [[] for _ in blocks.children()]
    for seen, block in zip(calls, blocks.children(), strict=True):
        for name, linear in linears(block).items():
            linear.register_forward_pre_hook(
                lambda _, args, name=name, seen=seen: seen.append((name, args[0]))
            )
    return calls


def test_every_declared_type_has_a_tiny_model():
    assert names() == sorted(TINY | FUSED)


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS)
def test_declaration_tells_the_truth(model_type, overrides):
    model = tiny(model_type, **overrides)
    architecture = find(model)
    assert model_type in architecture.model_types
    assert not architecture.probed
    assert_tells_the_truth(model, architecture)
    config = model.config
    counts = [config.num_hidden_layers, getattr(config, "num_decoder_layers", 0)]
    blocks = [len(model.base_model.get_submodule(stack.blocks)) for stack in architecture.stacks]
    assert blocks == counts[: len(blocks)]


@pytest.mark.parametrize(
    ("model_type", "head"),
    [
        pytest.param(model_type, head, id=f"{model_type}-{head.__name__}")
        for model_type in TINY
        for head in HEADS
        if CONFIG_MAPPING[model_type] in head._model_mapping
    ],
)
def test_names_hold_for_every_head(model_type, head):
    with torch.device("meta"):
        model = tiny(model_type, head)
    modules = dict(model.named_modules())
    stacks = find(model).stacks
    assert len(stacks) == (1 if model_type != "t5" or "Token" in head.__name__ else 2)
    for stack in stacks:
        for index, block in enumerate(model.base_model.get_submodule(stack.blocks)):
            for name, linear in linears(block).items():
                assert modules[f"{prefix(model)}{stack.blocks}.{index}.{name}"] is linear


def test_encoder_of_t5_alone_has_one_stack():
    model = T5EncoderModel(tiny("t5").config).eval()
    assert [stack.module for stack in find(model).stacks] == ["encoder"]
    assert_tells_the_truth(model, find(model))


@pytest.mark.parametrize("model_type", sorted(TINY.keys() - {"t5"}))
def test_probing_agrees_with_the_declaration(model_type):
    model = tiny(model_type)
    probed = probe(model)
    assert probed.probed
    assert probed.model_types == (model_type,)
    # Neurons are declared, never guessed; heads too where one linear writes queries, keys, values.
    (found,), (declared,) = probed.stacks, find(model).stacks
    assert replace(found, attentions=()) == replace(declared, attentions=(), feed_forwards=())
    assert len(found.attentions) == (model_type not in {"gpt2", "gpt_neox", "phi3"})
    for attention, theirs in zip(found.attentions, declared.attentions, strict=False):
        assert replace(attention, entries=()) == replace(theirs, entries=())


@pytest.mark.parametrize("model_type", UNDECLARED)
def test_probing_of_an_undeclared_type_tells_the_truth(model_type):
    model = tiny(model_type)
    architecture = find(model)
    assert architecture.probed
    assert_tells_the_truth(model, architecture)


def test_probing_needs_no_weights():
    with torch.device("meta"):
        model = tiny("olmo2")
    with torch.inference_mode():
        assert find(model) == find(tiny("olmo2"))


def test_linears_of_some_blocks_are_optional():
    (stack,) = find(tiny("lfm2")).stacks
    assert stack.optional == {
        *("conv.in_proj", "conv.out_proj", "self_attn.out_proj"),
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    }


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
        ("mamba", {}, r"backbone\.layers\.0\.mixer\.dt_proj was never called"),
        (
            "bart",
            {},
            "'bart' is not declared .* this model has encoder.layers, decoder.layers",
        ),
        ("albert", {}, "called more than once"),
        (
            "gpt2",
            {"add_cross_attention": True},
            r"transformer\.h\.0\.crossattention\.c_attn: no st",
        ),
    ],
)
def test_refuses_by_name(model_type, overrides, message):
    with pytest.raises(CheckpointError, match=message):
        find(tiny(model_type, **overrides))


def test_refuses_a_linear_that_no_stage_names():
    model = tiny("llama")
    model.model.layers[1].mlp.extra = nn.Linear(4, 4)
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1\.mlp\.extra: no stage"):
        find(model)


def test_refuses_a_block_without_a_named_linear():
    model = tiny("llama")
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1\.mlp\.up_proj: .* not have it"):
        find(model)


def test_refuses_fused_experts_of_a_declared_type():
    model = tiny("llama")
    model.model.layers[1].mlp.experts = nn.ParameterList([torch.zeros(2, 4, 4)])
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1\.mlp\.experts\.0: fused"):
        find(model)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        y = x.clone()
        first = self.first(y)
        # The same storage with other numbers, then again, in another shape.
        y.relu_()
        return first + self.second(y) + self.third(y.flatten(0, 1)).view_as(y)


class Toy(PreTrainedModel):
    """A model whose forward is the caller's."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(4, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, inputs_embeds, use_cache):
        for block in self.blocks:
            inputs_embeds = block(inputs_embeds)
        return inputs_embeds


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


class Uneven(Toy):
    """Its second block calls its linears in another order, or on another tensor, than the rest."""

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
    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.forward = lambda x, block=block: (
                block.first(x) + block.second(x + 1 if block.odd else x)
            )


def test_a_tensor_changed_in_place_starts_a_stage_and_a_view_does_not():
    architecture = find(Toy(PreTrainedConfig()))
    assert architecture.stacks == (Stack("blocks", (Stage("first"), Stage("second", "third"))),)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Backwards, r"not called in the order of their list: \[2, 1, 0\]"),
        (TwoLists, "one list of blocks, this model has blocks, others"),
        (Lazy, r"blocks\.2\.first was never called"),
        (ReadsNumbers, "without reading numbers"),
        (Blockless, "no ModuleList was found"),
        (Uneven, "in different orders"),
        (Sharing, "first shares its input with other linears in some blocks only"),
    ],
)
def test_refuses_to_guess(model, message):
    with pytest.raises(CheckpointError, match=message) as refusal:
        find(model(PreTrainedConfig()))
    assert "Declare the family" in str(refusal.value)


def test_refuses_a_declared_type_that_keeps_its_blocks_elsewhere():
    model = Toy(PreTrainedConfig())
    model.config.model_type = "llama"
    with pytest.raises(CheckpointError, match="Toy: no blocks at layers"):
        find(model)


def test_an_entry_point_declares_a_family(monkeypatch):
    class Entry:
        def load(self):
            return theirs

    theirs = Architecture(("olmo2", "llama"), find(tiny("llama")).stacks)
    architectures._declared.cache_clear()
    monkeypatch.setattr(architectures, "entry_points", lambda group: [Entry()] * bool(group))
    try:
        assert "olmo2" in names()
        assert find(tiny("olmo2")) == find(tiny("llama")) == theirs
    finally:
        architectures._declared.cache_clear()
