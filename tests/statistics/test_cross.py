"""Cross Gram matrix of the difference of two input streams."""

import torch
from hypothesis import given

from prunekit.statistics import CrossGram
from tests.support.statistics import features, inputs, law, seeds, tokens


@law
@given(tokens, features, seeds)
def test_models_that_read_the_same_do_not_differ(count, width, seed):
    statistic = CrossGram(width)
    statistic.update(inputs(count, width, seed))
    statistic.update_pair(*[inputs(count, width, seed)] * 2)
    assert statistic.tokens == 2 * count
    assert not statistic.total.any()


@law
@given(tokens, features, seeds, seeds)
def test_the_sum_is_its_formula(count, width, seed, other):
    x, dense = inputs(count, width, seed), inputs(count, width, other)
    statistic = CrossGram(width)
    statistic.update_pair(x, dense)
    assert statistic.tokens == count
    assert torch.equal(statistic.total, (dense - x).T @ x)
