"""Heads of model types nobody declared, found where transformers calls its attention function."""

import pytest
import torch

import prunekit
from prunekit.errors import CheckpointError
from tests.support.units import answers, batch, restless


@pytest.mark.parametrize("model_type", ["electra", "glm", "granite", "phi", "stablelm"])
def test_heads_of_a_probed_type_go_as_those_of_a_declared_one(model_type, tmp_path):
    model = restless(model_type)
    given = batch(model)
    gates = prunekit.heads(model)
    for index, place in enumerate(gates.places):
        gates.gates[place.name].keep[index % place.units] = False
    expected = answers(model, given)
    before, gone = model.num_parameters(), sum(int(place.costs[0]) for place in gates.places)
    done = gates.finalize()
    assert model.num_parameters() == before - gone
    found = answers(model, given)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.save_pretrained(tmp_path)
    assert torch.equal(answers(prunekit.load(tmp_path), given), found)
    if done.stock:
        opened = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(answers(opened, given), found)
    assert done.stock == (model_type not in {"electra", "stablelm"})


def test_every_ranker_of_heads_scores_those_of_a_probed_type():
    gates = prunekit.heads(restless("granite"))
    tokens = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(1))
    for name in ("entropy", "magnitude", "gradient", "obs"):
        scores = torch.cat([*gates.score(name, tokens).values()])
        assert len(scores) == 4
        assert scores.isfinite().all()


REFUSED = {
    "bloom": "query, key and value in one linear",
    "olmo2": "a norm over all heads",
    "cohere": "a norm with weights of its own for each head",
    "lfm2": "blocks without attention",
    "gptj": "attention outside of the interface",
}


@pytest.mark.parametrize("model_type", REFUSED, ids=REFUSED.get)
def test_heads_that_cannot_be_told_apart_are_refused(model_type):
    """Never a model that is left as it was without a word."""
    with pytest.raises(CheckpointError, match=f"{model_type!r} keep their heads"):
        prunekit.heads(restless(model_type))
