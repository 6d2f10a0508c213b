"""Attention entropy: uniform attention has the maximum entropy."""

import pytest
import torch

import prunekit
from prunekit.models.orientation import weight_matrix
from prunekit.models.units.heads_neurons import linear_groups
from tests.support.rankers import TOKENS, flat
from tests.support.units import randomized_model


def test_entropy_prunes_the_head_that_looks_everywhere_alike_first():
    model = randomized_model("gpt2")
    query = linear_groups(model, "heads")[1].writers[0]
    with torch.no_grad():
        weight_matrix(query.linear)[query.index[2].flatten()] = 0
        query.linear.bias[query.index[2].flatten()] = 0
    gates = prunekit.heads(model)
    scores = gates.score("entropy", TOKENS)
    assert scores["transformer.h.1.attn"][2] == pytest.approx(-1, abs=1e-6)
    assert gates.prune(scores, 0.125)[0][:2] == (1, 2)
    nats = flat(gates.score("entropy", TOKENS, normalised=False))
    # ln 12 in the last row, less in earlier rows.
    assert (-nats).max() < torch.arange(1, 13).double().log().mean() + 1e-6
