"""Router mass is a distribution over the experts, where shares are."""

import torch

import prunekit
from tests.support.rankers import TOKENS, flat
from tests.support.units import randomized_model


def test_the_masses_of_a_layer_add_up_to_one_and_closed_experts_have_none():
    gates = prunekit.experts(randomized_model("mixtral"))
    gates.gate(1, 0, 0.0)
    found = gates.score("router-mass", TOKENS)
    for mass in found.values():
        torch.testing.assert_close(mass.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert (flat(found) > 0).sum() == 7
    assert float(found[gates.groups[1].name][0]) == 0
