"""Hybrid scores against the scores of their components."""

import pytest
import torch

import prunekit
from prunekit.errors import ConfigError
from tests.support.rankers import TOKENS, flat
from tests.support.units import randomized_model


def test_a_hybrid_adds_z_scores_or_places_of_its_parts():
    gates = prunekit.heads(randomized_model("gpt2"))
    a, b = (flat(gates.score(name, TOKENS)) for name in ("magnitude", "entropy"))
    of = {"magnitude": 0.7, "entropy": -0.3}
    found = flat(gates.score("hybrid", TOKENS, of=of, by="z-score"))
    z = [(part - part.mean()) / part.std(correction=0) for part in (a, b)]
    torch.testing.assert_close(found, 0.7 * z[0] - 0.3 * z[1])
    found = flat(gates.score("hybrid", TOKENS, of={"magnitude": 1}))
    assert (found * 7).round().tolist() == a.argsort().argsort().double().tolist()
    found = flat(gates.score("hybrid", TOKENS, of={"magnitude": 2, "entropy": 1}, by="product"))
    torch.testing.assert_close(found, a**2 * (b - b.min()))
    with pytest.raises(
        ConfigError, match=r"'weight' is no ranker\. Choose: block-influence, entropy"
    ):
        gates.score("hybrid", TOKENS, of={"weight": 1})
    with pytest.raises(ConfigError, match="product takes weights above 0 only"):
        gates.score("hybrid", TOKENS, of={"magnitude": 1, "entropy": -1}, by="product")
