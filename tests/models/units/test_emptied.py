"""Attentions and feed-forwards without units: output, files, caches, later changes."""

import copy
import json
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import prunekit
from prunekit.architectures.empty_linear import EmptyLinear
from prunekit.errors import CheckpointError
from prunekit.models.units.emptied import emptied
from prunekit.models.units.find import unit_groups
from tests.support.architectures import TINY
from tests.support.tiers import often
from tests.support.units import (
    EQUAL_DEPTH,
    batch,
    close_whole,
    randomized_model,
    skip_without_attention_interface,
    valid_logits,
)

FIRST_HEADS = {"t5": (0, 2, 3)}
"""Groups of heads in the first blocks: of T5 the encoder's, the decoder's, cross-attention."""
DECODERS = sorted({*TINY} - {"bert", "distilbert", "roberta"})


def model_of(model_type, **overrides):
    return randomized_model(model_type, **{**EQUAL_DEPTH.get(model_type, {}), **overrides})


def without_first(
    model_type: str,
    heads: Sequence[int] | None = None,
    neurons: Sequence[int] = (0,),
    **overrides: Any,
) -> tuple[Any, torch.Tensor]:
    """Return a model without units in some attentions and feed-forwards, and the gated logits."""
    model = model_of(model_type, **overrides)
    skip_without_attention_interface(model)
    chosen = FIRST_HEADS.get(model_type, (0,)) if heads is None else heads
    gates = [close_whole(model, "heads", chosen), close_whole(model, "neurons", neurons)]
    expected = valid_logits(model, batch(model))
    for each in gates:
        each.finalize()
    return model, expected


def assert_close(actual, expected):
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("model_type", often(sorted(TINY)))
def test_answers_as_the_gated_model_and_opens_with_the_same_bits(model_type, tmp_path):
    dense = model_of(model_type)
    model, expected = without_first(model_type)
    given = batch(model)
    logits = valid_logits(model, given)
    assert_close(logits, expected)
    assert (logits - valid_logits(dense, given)).abs().max() > 1e-2 * logits.abs().max()
    gone = [*emptied(model, "heads"), *emptied(model, "neurons")]
    assert len(gone) == len(FIRST_HEADS.get(model_type, (0,))) + 1
    assert all(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    for opened in (prunekit.load(tmp_path), type(model).from_pretrained(tmp_path).eval()):
        assert torch.equal(valid_logits(opened, given), logits)
        assert opened.num_parameters() == model.num_parameters() < dense.num_parameters()
        if model_type in DECODERS:
            prompt = {"input_ids": given["input_ids"][1:]}
            texts = [
                opened.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=cached)
                for cached in (True, False)
            ]
            assert torch.equal(*texts)


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "llama", "t5"])
def test_padding_beams_and_a_static_cache_count_the_same_tokens(model_type):
    model, _ = without_first(model_type)
    given = {name: value for name, value in batch(model, left=True).items() if name != "labels"}
    texts = [
        model.generate(**given, max_new_tokens=6, do_sample=False, num_beams=2, **options)
        for options in (
            {"use_cache": False},
            {"use_cache": True},
            {"use_cache": True, "cache_implementation": "static"},
        )
    ]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_attention_weights_are_listed_of_every_layer(model_type):
    model, _ = without_first(model_type)
    model.set_attn_implementation("eager")
    attentions = model(**batch(model), output_attentions=True).attentions
    assert [each.shape for each in attentions] == [(2, 0, 9, 9), (2, 4, 9, 9)]


@pytest.mark.parametrize("model_type", ["gpt2", "t5"])
def test_a_copy_has_its_own_weights_and_a_pickle_the_same_output(model_type):
    model, _ = without_first(model_type)
    logits = valid_logits(model, batch(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(valid_logits(other, batch(model)), logits)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(valid_logits(model, batch(model)), logits)


def test_every_parameter_that_is_left_has_a_gradient():
    """So that wrappers that wait for all gradients, such as DDP, do not wait forever."""
    model, _ = without_first("qwen3")
    model(**batch(model), labels=batch(model)["input_ids"]).loss.backward()
    assert [name for name, each in model.named_parameters() if each.grad is None] == []


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "t5"])
def test_more_units_are_removed_and_another_layer_emptied(model_type, tmp_path):
    model, _ = without_first(model_type)
    model.save_pretrained(tmp_path / "first")
    model, given = prunekit.load(tmp_path / "first"), batch(model)
    for kind in ("heads", "neurons"):
        before = emptied(model, kind)
        gates = getattr(prunekit, kind)(model)
        assert not {*before} & {*gates.gates}
        (name, *others) = [*gates.gates][::-1]
        keep = gates.keep
        for each in others:
            keep[each][0] = False
        if others:
            keep[name][:] = False
        else:
            keep[name][1:] = False
        gates.close(keep)
        expected = valid_logits(model, given)
        done = gates.finalize()
        assert not done.stock
        assert_close(valid_logits(model, given), expected)
        assert {*emptied(model, kind)} == {*before} | ({name} if others else set())
    model.save_pretrained(tmp_path / "second")
    opened = prunekit.load(tmp_path / "second")
    assert torch.equal(valid_logits(opened, given), valid_logits(model, given))


def test_equal_heads_beside_an_attention_without_any_are_recorded_too(tmp_path):
    """A config would make a bias of fewer columns, also in the attention that computes it."""
    model, _ = without_first("t5")
    gates = prunekit.heads(model)
    gates.prune(gates.score("random"), 0.5, scope="layer")
    keep = {name: torch.tensor([True, False, True, False]) for name in gates.gates}
    gates.reactivate([(layer, unit) for layer in range(len(keep)) for unit in range(4)])
    gates.close(keep)
    expected = valid_logits(model, batch(model))
    assert not gates.finalize().stock
    assert_close(valid_logits(model, batch(model)), expected)
    model.save_pretrained(tmp_path)
    opened = prunekit.load(tmp_path)
    assert torch.equal(valid_logits(opened, batch(model)), valid_logits(model, batch(model)))


@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_coordinates_and_blocks_are_removed_beside_them(model_type, tmp_path):
    depths = {"num_layers": 3, "num_decoder_layers": 3} if model_type == "t5" else {}
    heads = (1, 3, 5) if model_type == "t5" else (1,)
    model, _ = without_first(model_type, heads, (1,), **(depths or {"num_hidden_layers": 3}))
    given = batch(model)
    hidden = prunekit.hidden(model)
    hidden.prune({name: torch.arange(32.0) for name in hidden.gates}, 0.25)
    expected = valid_logits(model, given)
    hidden.finalize()
    assert_close(valid_logits(model, given), expected)
    # The first block that is left has no heads, and computes a shared bias from now on.
    blocks = prunekit.blocks(model)
    for layer in range(len(blocks.groups)):
        blocks.gate(layer, 0, 0.0)
        blocks.close({name: gate.keep & (gate.value != 0) for name, gate in blocks.gates.items()})
    expected = valid_logits(model, given)
    blocks.finalize()
    assert_close(valid_logits(model, given), expected)
    assert ".0." in emptied(model, "heads")[0]
    model.save_pretrained(tmp_path)
    opened = prunekit.load(tmp_path)
    assert torch.equal(valid_logits(opened, given), valid_logits(model, given))


def test_a_model_without_any_heads_says_that_none_are_left():
    model, _ = without_first("llama", heads=(1,))
    blocks = prunekit.blocks(model)
    blocks.close({name: torch.tensor([False, True]) for name in blocks.gates})
    blocks.finalize()
    with pytest.raises(CheckpointError, match="all of its heads are removed"):
        unit_groups(model, "heads")


@pytest.mark.parametrize("units", [0, -1, 5, [4], [0.5], "x", None])
def test_a_record_that_is_not_of_the_files_is_refused(units, tmp_path):
    """Files have the weights of layers that the record would take out."""
    model = model_of("llama")
    close_whole(model, "neurons", (0,)).finalize()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["prunekit_kept"]["model.layers.1.self_attn"] = units
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"of a layer of which|belongs to another model"):
        prunekit.load(tmp_path)


def test_its_linears_are_shown_as_empty_ones():
    model, _ = without_first("opt")
    layer = model.model.decoder.layers[0]
    assert repr(layer.self_attn.q_proj) == "EmptyLinear(in_features=32, out_features=0)"
    assert isinstance(layer.fc2, EmptyLinear)
    assert [*dict(layer.self_attn.named_parameters())] == ["out_proj.bias"]
