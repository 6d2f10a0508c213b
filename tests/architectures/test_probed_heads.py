"""Heads of undeclared model types, found by tracing the attention function."""

import pytest
import torch

import prunekit
from prunekit.errors import CheckpointError
from tests.support.units import batch, randomized_model, valid_logits


@pytest.mark.parametrize(
    "model_type", ["electra", "glm", "granite", "modernbert", "phi", "stablelm"]
)
def test_heads_of_a_probed_type_go_as_those_of_a_declared_one(model_type, tmp_path):
    model = randomized_model(model_type)
    given = batch(model)
    gates = prunekit.heads(model)
    for index, place in enumerate(gates.groups):
        gates.gates[place.name].keep[index % place.units] = False
    expected = valid_logits(model, given)
    before, gone = model.num_parameters(), sum(int(place.costs[0]) for place in gates.groups)
    done = gates.finalize()
    assert model.num_parameters() == before - gone
    found = valid_logits(model, given)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.save_pretrained(tmp_path)
    assert torch.equal(valid_logits(prunekit.load(tmp_path), given), found)
    if done.stock:
        opened = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(valid_logits(opened, given), found)
    assert done.stock == (model_type not in {"electra", "modernbert", "stablelm"})


def test_every_ranker_of_heads_scores_those_of_a_probed_type():
    gates = prunekit.heads(randomized_model("granite"))
    tokens = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(1))
    for name in ("entropy", "magnitude", "gradient", "obs"):
        scores = torch.cat([*gates.score(name, tokens).values()])
        assert len(scores) == 4
        assert scores.isfinite().all()


REFUSED = {
    "bloom": "query, key and value in one linear",
    "olmo2": "a norm over all heads",
    "cohere": "a norm with weights of its own for each head",
    "gptj": "attention outside of the interface",
}


@pytest.mark.parametrize("model_type", REFUSED, ids=REFUSED.get)
def test_heads_that_cannot_be_told_apart_are_refused(model_type):
    """The model must not silently be left unpruned."""
    with pytest.raises(CheckpointError, match=f"{model_type!r} keep their heads"):
        prunekit.heads(randomized_model(model_type))


def test_blocks_without_attention_have_no_heads():
    model = randomized_model("lfm2")
    given, gates = batch(model), prunekit.heads(model)
    kinds = model.config.layer_types
    assert len(gates.groups) == kinds.count("full_attention") < len(kinds)
    for place in gates.groups:
        gates.gates[place.name].keep[0] = False
    expected = valid_logits(model, given)
    gates.finalize()
    found = valid_logits(model, given)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
