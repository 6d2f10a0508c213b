"""Observing attention changes no bit of the output, and entropy is exact."""

import pytest
import torch

from prunekit.errors import CheckpointError
from prunekit.models.attention_hook import observe_attention
from prunekit.models.units.heads_neurons import linear_groups
from prunekit.structured.gated_model import GatedModel
from prunekit.structured.probes.attention_entropy import head_entropies
from tests.support.architectures import TINY
from tests.support.units import (
    EQUAL_DEPTH,
    LENGTH,
    PADDED,
    batch,
    randomized_model,
    skip_without_attention_interface,
    valid_logits,
)


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_a_model_answers_to_the_bit_as_before_while_it_is_observed(model_type):
    model = randomized_model(model_type)
    skip_without_attention_interface(model)
    given = batch(model)
    before, implementation = valid_logits(model, given), model.config._attn_implementation
    seen = []
    heads = linear_groups(model, "heads")
    observers = {site.module: lambda module, *_: seen.append(module) for site in heads}
    with observe_attention(model, observers):
        assert torch.equal(valid_logits(model, given), before)
    assert [id(module) for module in seen] == [id(site.module) for site in heads]
    assert torch.equal(valid_logits(model, given), before)
    assert len(seen) == len(heads)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "llama", "t5"])
def test_text_is_written_as_before_while_it_is_observed(model_type):
    model = randomized_model(model_type, **EQUAL_DEPTH.get(model_type, {}))
    given = {name: part for name, part in batch(model, left=True).items() if name != "labels"}
    before = model.generate(**given, max_new_tokens=5, do_sample=False)
    with observe_attention(model, {}):
        assert torch.equal(model.generate(**given, max_new_tokens=5, do_sample=False), before)


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_entropy_is_that_of_the_probabilities_of_eager_attention_in_float64(model_type):
    """Only valid rows count, also with soft caps, windows, biases, grouped queries."""
    model = randomized_model(model_type).double()
    skip_without_attention_interface(model)
    given = batch(model)
    found = head_entropies(_gated(model, [given]))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        shown = model(**given, output_attentions=True)
    decodes = torch.ones(2, 5, dtype=torch.bool)
    decodes[1, 3:] = False
    mask = given["attention_mask"].bool()
    if model_type == "t5":
        maps = [(p, mask) for p in shown.encoder_attentions]
        for own, cross in zip(shown.decoder_attentions, shown.cross_attentions, strict=True):
            maps += [(own, decodes), (cross, decodes)]
    else:
        maps = [(p, mask) for p in shown.attentions]
    assert len(maps) == len(found)
    for sums, (p, valid) in zip(found.values(), maps, strict=True):
        rows = p.movedim(1, 2)[valid]  # [rows, heads, keys]
        n = (rows > 0).sum(-1).double()
        truth = torch.special.entr(rows).sum((0, 2)), n.log().sum(0), (n > 0).sum(0).double()
        for actual, exact in zip(sums, truth, strict=True):
            # Most families compute the softmax in float32, also in a float64 model.
            torch.testing.assert_close(actual, exact, rtol=1e-7, atol=1e-6)
    assert found[linear_groups(model, "heads")[0].name].rows[0] == PADDED + LENGTH


def test_a_head_whose_queries_are_zero_has_the_highest_entropy_there_is():
    """Uniform attention over n visible keys has entropy ln n."""
    model = randomized_model("llama")
    site = linear_groups(model, "heads")[0]
    query = site.writers[0]
    with torch.no_grad():
        query.linear.weight[query.index[1].flatten()] = 0
    sums = head_entropies(_gated(model, [{"input_ids": torch.arange(3, 20)[None]}], [site]))[
        site.name
    ]
    share = sums.entropy / sums.log_keys
    torch.testing.assert_close(share[2:], torch.ones(2).double(), rtol=0, atol=1e-6)
    assert share[:2].max() < 0.999
    assert float(sums.log_keys[0]) == pytest.approx(sum(torch.arange(1, 18).double().log()).item())


def test_entropies_of_batches_add_up():
    model = randomized_model("gpt2")
    heads = linear_groups(model, "heads")
    parts = [{"input_ids": torch.arange(3 + i, 12 + i)[None]} for i in range(3)]
    together = head_entropies(_gated(model, parts, heads))
    alone = [head_entropies(_gated(model, [part], heads)) for part in parts]
    for site in heads:
        for index in range(3):
            total = sum(sums[site.name][index] for sums in alone)
            torch.testing.assert_close(together[site.name][index], total)


def test_refuses_an_implementation_that_it_does_not_stand_for():
    model = randomized_model("llama")
    model.config._attn_implementation = "flex_attention"
    refusal = "runs in 'flex_attention'; heads can be observed in"
    with pytest.raises(CheckpointError, match=refusal), observe_attention(model, {}):
        pass


def test_refuses_attention_that_is_computed_elsewhere():
    module = torch.nn.Linear(1, 1)
    refusal = r"Linear: transformers .* outside of its"
    watched = observe_attention(randomized_model("bert"), {module: lambda *_: None})
    with pytest.raises(CheckpointError, match=refusal), watched:
        pass


def _gated(model, batches, groups=None):
    return GatedModel(model, groups or linear_groups(model, "heads"), {}, batches)
