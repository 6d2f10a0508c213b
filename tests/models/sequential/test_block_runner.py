"""Blocks run one by one, bit-identical to a whole forward."""

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from prunekit.architectures import find_architecture
from prunekit.errors import ConfigError
from prunekit.models.layout import stack_runners
from prunekit.models.sequential.pipeline import iterate_blocks
from tests.support.architectures import TINY, tiny
from tests.support.blocks import outputs_block_by_block, outputs_of_whole
from tests.support.family_configs import tiny_config
from tests.support.tiers import DISTINCT, often

HEADS = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
PROBED = ("bloom", "falcon", "gpt_neo", "lfm2", "modernbert", "mpt", "olmo2", "phi", "stablelm")
MODELS = [
    *((model_type, None) for model_type in (*TINY, *PROBED)),
    *(
        (model_type, head)
        for model_type in TINY
        for head in HEADS
        if CONFIG_MAPPING[model_type] in head._model_mapping
    ),
]


def built(model_type, head=None):
    return tiny(model_type, head, use_cache=False)


@pytest.mark.parametrize(
    ("model_type", "head"),
    often(MODELS, [each for each in MODELS if each[0] in {*DISTINCT, *PROBED}]),
)
def test_blocks_one_by_one_give_the_bits_of_the_whole_model(model_type, head, ids):
    model = built(model_type, head)
    expected, answer = outputs_of_whole(model, ids)
    outputs, visit = outputs_block_by_block(model, [ids])
    assert len(outputs) == len(expected)
    for (mine,), theirs in zip(outputs, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(visit.hidden[0], expected[-1])
    if type(model).__name__.endswith(("CausalLM", "LMHeadModel")):
        assert torch.equal(visit.runner.head(visit.hidden[0]), answer)
    if head is AutoModel:
        assert torch.equal(visit.runner.finish(visit.hidden[0], visit.contexts[0]), answer)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "t5", "roberta"])
def test_batches_of_unequal_size_change_nothing_but_rounding(model_type, ids):
    model = built(model_type)
    whole, _ = outputs_block_by_block(model, [ids])
    cut, _ = outputs_block_by_block(model, list(ids.split(2)))
    for mine, (theirs,) in zip(cut, whole, strict=True):
        torch.testing.assert_close(torch.cat(mine), theirs, rtol=1e-5, atol=1e-5)


def test_windows_of_unequal_length_each_give_the_bits_of_the_whole_model(ids):
    model = built("t5")
    parts = [ids, ids[:2, :4], ids[:2, :7]]
    _, visit = outputs_block_by_block(model, parts)
    for hidden, part in zip(visit.hidden, parts, strict=True):
        assert torch.equal(hidden, outputs_of_whole(model, part)[0][-1])


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "t5", "gpt2", "modernbert"])
def test_a_bound_call_may_be_made_later_and_again(model_type, ids):
    model = built(model_type)
    expected, _ = outputs_of_whole(model, ids)
    calls = []
    for visit in iterate_blocks(model, stack_runners(model, find_architecture(model)), None, [ids]):
        given = zip(visit.hidden, visit.contexts, strict=True)
        calls += [visit.runner.bind(visit.index, x.clone(), context) for x, context in given]
    with torch.inference_mode():
        for call, theirs in reversed(list(zip(calls, expected, strict=True))):
            assert torch.equal(call(), theirs)
            assert torch.equal(call(), theirs)


@pytest.mark.parametrize("model_type", ["llama", "t5", "modernbert"])
def test_the_model_is_whole_again_after_a_walk_and_between_visits(model_type, ids):
    model = built(model_type)
    before = list(model.named_modules())
    _, answer = outputs_of_whole(model, ids)
    for _ in iterate_blocks(model, stack_runners(model, find_architecture(model)), None, [ids]):
        assert list(model.named_modules()) == before
        assert torch.equal(outputs_of_whole(model, ids)[1], answer)
    assert list(model.named_modules()) == before


def test_the_model_is_whole_again_after_an_error_in_a_block(ids):
    model = built("llama")
    before = list(model.named_modules())
    block = model.model.layers[0]
    hook = block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(iterate_blocks(model, stack_runners(model, find_architecture(model)), None, [ids]))
    hook.remove()
    assert list(model.named_modules()) == before


@pytest.mark.parametrize(
    "model_type", ["gemma3n_text", "gemma4_text", "bart", "marian", "switch_transformers", "zaya"]
)
def test_what_blocks_share_and_read_of_an_encoder_is_each_batch_s_own(model_type, ids):
    """Batches of one shape: what one of them shares must not reach another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Its blocks hand on the states of their routers.
        zaya = AutoModelForCausalLM.from_config(tiny_config("zaya"), use_cache=False).eval()
    model = zaya if model_type == "zaya" else built(model_type)
    batches = [ids[:1], ids[1:2]]
    _, visit = outputs_block_by_block(model, batches)
    for number, batch in enumerate(batches):
        more = {"decoder_input_ids": batch} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            answer = model(input_ids=batch, **more)[0]
        found = visit.runner.head(visit.hidden[number], visit.contexts[number])
        torch.testing.assert_close(found, answer)


def test_a_sample_that_the_model_pads_is_refused():
    model = tiny("llama")
    runner = stack_runners(model, find_architecture(model))[0]
    with pytest.raises(
        ConfigError, match=r"LlamaForCausalLM pads samples of 5 tokens to 8 .*as 8\."
    ):
        runner._check_length(torch.zeros(1, 5), torch.zeros(1, 8, 32))
