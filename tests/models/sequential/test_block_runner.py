"""One block inside its own model: the same bits as the whole, streamed, halted or abandoned."""

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
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.models.empty_model import empty_model
from prunekit.models.layout import stack_runners
from prunekit.models.sequential.pipeline import batches, iterate_blocks
from prunekit.models.sequential.weights import Weights
from tests.support import checkpoints
from tests.support.architectures import TINY, tiny

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


@pytest.fixture
def ids():
    ids = torch.randint(3, 60, (5, 11), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 2  # the end of text, which a T5 that classifies wants to see
    return ids


def full(model, ids):
    """Return what each block gives in the model's own forward, and the model's first answer."""
    outputs = []
    hooks = [
        block.register_forward_hook(
            lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple | list) else out)
        )
        for runner in stack_runners(model, find_architecture(model))
        for block in runner.blocks
    ]
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.inference_mode():
        answer = model(**inputs)[0]
    for hook in hooks:
        hook.remove()
    return outputs, answer


def streamed(model, parts, weights=None):
    """Return what each block gives when they run one by one, and the last visit."""
    outputs = []
    for visit in iterate_blocks(model, stack_runners(model, find_architecture(model)), weights, parts):
        with torch.inference_mode():
            outputs.append([call() for call in visit.calls()])
    return outputs, visit


@pytest.mark.parametrize(("model_type", "head"), MODELS)
def test_blocks_one_by_one_give_the_bits_of_the_whole_model(model_type, head, ids):
    model = built(model_type, head)
    expected, answer = full(model, ids)
    outputs, visit = streamed(model, [ids])
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
    whole, _ = streamed(model, [ids])
    cut, _ = streamed(model, list(ids.split(2)))
    for mine, (theirs,) in zip(cut, whole, strict=True):
        torch.testing.assert_close(torch.cat(mine), theirs, rtol=1e-5, atol=1e-5)


def test_windows_of_unequal_length_each_give_the_bits_of_the_whole_model(ids):
    model = built("t5")
    parts = [ids, ids[:2, :4], ids[:2, :7]]
    _, visit = streamed(model, parts)
    for hidden, part in zip(visit.hidden, parts, strict=True):
        assert torch.equal(hidden, full(model, part)[0][-1])


def test_samples_are_cut_into_batches_of_about_equal_tokens():
    parts = batches(torch.zeros(10, 512, dtype=torch.int64), torch.device("cpu"))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert len(batches(torch.zeros(2, 5000, dtype=torch.int64), torch.device("cpu"))) == 2


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "t5", "gpt2", "modernbert"])
def test_a_bound_call_may_be_made_later_and_again(model_type, ids):
    model = built(model_type)
    expected, _ = full(model, ids)
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
    _, answer = full(model, ids)
    for _ in iterate_blocks(model, stack_runners(model, find_architecture(model)), None, [ids]):
        assert list(model.named_modules()) == before
        assert torch.equal(full(model, ids)[1], answer)
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


@pytest.mark.parametrize("model_type", [*TINY, "modernbert", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_from_a_checkpoint_gives_the_bits_of_a_loaded_model(
    tmp_path, ids, model_type, dtype
):
    folder = checkpoints.write(tmp_path, model_type, dtype)
    opened = open_checkpoint(folder)
    model = empty_model(opened)
    weights = Weights(model, opened, torch.float32, torch.device("cpu"))
    outputs, _ = streamed(model, [ids], weights)
    loaded = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    for (mine,), theirs in zip(outputs, full(loaded, ids)[0], strict=True):
        assert torch.equal(mine, theirs)


def test_only_one_block_has_weights_at_a_time(tmp_path, ids):
    opened = open_checkpoint(checkpoints.write(tmp_path, num_hidden_layers=3))
    model = empty_model(opened)
    weights = Weights(model, opened, torch.float32, torch.device("cpu"))
    for visit in iterate_blocks(model, stack_runners(model, find_architecture(model)), weights, [ids]):
        for block in visit.runner.blocks:
            real = {not parameter.is_meta for parameter in block.parameters()}
            assert real == {block is visit.module}
        assert model.lm_head.weight.is_meta
        assert model.model.embed_tokens.weight.is_meta
    assert all(block.mlp.up_proj.weight.is_meta for block in model.model.layers)


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
    outputs, _ = streamed(model, [ids], weights)
    for (mine,), theirs in zip(outputs, full(base, ids)[0], strict=True):
        assert torch.equal(mine, theirs)
    folder = checkpoints.write(tmp_path / "tied", "llama", tie_word_embeddings=True)
    opened = open_checkpoint(folder)
    assert "lm_head.weight" not in opened.entries
    stored = Weights(empty_model(opened), opened, torch.float32, torch.device("cpu")).stored
    assert stored["lm_head.weight"] == "model.embed_tokens.weight"
