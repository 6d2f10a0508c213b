"""Declared stages match a forward pass, for every model head."""

import pytest
import torch
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
)

from prunekit import architectures
from prunekit.architectures import Architecture, declared_model_types, find_architecture
from prunekit.architectures.coverage import base_model_prefix, named_linears
from prunekit.errors import CheckpointError
from tests.support.architectures import FUSED, TINY, assert_stages_match_forward, tiny
from tests.support.toy_model import Toy

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


def test_every_declared_type_has_a_tiny_model():
    assert declared_model_types() == sorted(TINY | FUSED)


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS)
def test_declaration_tells_the_truth(model_type, overrides):
    model = tiny(model_type, **overrides)
    architecture = find_architecture(model)
    assert model_type in architecture.model_types
    assert not architecture.probed
    assert_stages_match_forward(model, architecture)
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
    stacks = find_architecture(model).stacks
    assert len(stacks) == (1 if model_type != "t5" or "Token" in head.__name__ else 2)
    for stack in stacks:
        for index, block in enumerate(model.base_model.get_submodule(stack.blocks)):
            for name, linear in named_linears(block).items():
                assert modules[f"{base_model_prefix(model)}{stack.blocks}.{index}.{name}"] is linear


def test_refuses_a_declared_type_that_keeps_its_blocks_elsewhere():
    model = Toy(PreTrainedConfig())
    model.config.model_type = "llama"
    with pytest.raises(CheckpointError, match="Toy: no blocks at layers"):
        find_architecture(model)


def test_an_entry_point_declares_a_family(monkeypatch):
    class Entry:
        def load(self):
            return theirs

    theirs = Architecture(("olmo2", "llama"), find_architecture(tiny("llama")).stacks)
    architectures._architectures_by_type.cache_clear()
    monkeypatch.setattr(architectures, "entry_points", lambda group: [Entry()] * bool(group))
    try:
        assert "olmo2" in declared_model_types()
        assert find_architecture(tiny("olmo2")) == find_architecture(tiny("llama")) == theirs
    finally:
        architectures._architectures_by_type.cache_clear()
