"""Random scores, determined by the seed."""

import torch

import prunekit
from tests.support.architectures import tiny
from tests.support.rankers import flat


def test_random_is_seeded_and_different_for_another_seed():
    gates = prunekit.heads(tiny("bert"))
    first, again, other = (flat(gates.score("random", seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
