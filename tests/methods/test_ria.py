"""RIA follows its published formula."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit.methods.ria import Ria
from tests.support.methods import law, layer, seeds, tokens, weights


@law
@given(seeds, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_ria_is_its_formula(seed, power):
    x, weight = tokens(50, 24, seed), weights(7, 24, seed)
    given = layer("unstructured", x=x, weight=weight)
    magnitude, norm = weight.double().abs(), x.double().norm(dim=0)
    relative = magnitude / magnitude.sum(0) + magnitude / magnitude.sum(1, keepdim=True)
    exact = relative * (norm / len(x) ** 0.5) ** power
    score = Ria(activation_power=power).score(given)
    torch.testing.assert_close(score.double(), exact, rtol=2e-5, atol=0)


def test_ria_by_default_takes_the_root_of_the_norm():
    assert Ria().activation_power == 0.5


def test_ria_gives_an_empty_row_or_column_no_score():
    weight = weights(6, 8)
    weight[2] = 0
    weight[:, 5] = 0
    score = Ria().score(layer("2:4", x=tokens(9, 8), weight=weight))
    assert score.isfinite().all()
    assert not score[2].any()
    assert not score[:, 5].any()
