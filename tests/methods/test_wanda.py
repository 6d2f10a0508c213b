"""Wanda weighs magnitudes by input norms."""

import pytest
import torch

from prunekit.methods.magnitude import Magnitude
from prunekit.methods.ria import Ria
from prunekit.methods.wanda import Wanda
from tests.support.methods import INPUTS, every_pattern, layer, tokens


def test_wanda_weighs_by_the_norm_of_the_input():
    given = layer("2:4", x=torch.tensor([[1.0, 10, 1, 1]]), weight=torch.tensor([[3.0, -1, 2, 1]]))
    assert Wanda().prune(given).weight.tolist() == [[3, -1, 0, 0]]


@every_pattern
def test_wanda_of_inputs_that_are_equally_loud_is_magnitude(pattern):
    given = layer(pattern, x=torch.ones(4, INPUTS))
    assert torch.equal(Wanda().prune(given).keep, Magnitude().prune(given).keep)


@pytest.mark.parametrize("method", [Wanda(), Ria()])
def test_seeing_every_token_twice_changes_no_mask(method):
    x = tokens()
    once, twice = (method.prune(layer("unstructured", x=part)) for part in (x, torch.cat([x, x])))
    assert torch.equal(once.keep, twice.keep)
