"""Column energy is the sum of squares of each input."""

import torch
from hypothesis import given

from prunekit.statistics import ColumnEnergy
from tests.support.statistics import accumulate, features, inputs, law, seeds, tokens


@law
@given(tokens, features, seeds)
def test_the_sum_is_its_formula(count, width, seed):
    x = inputs(count, width, seed)
    found = accumulate(ColumnEnergy, x)
    assert torch.equal(found.total, (x * x).sum(0))
    assert found.total.shape == (width,)
