"""Gram matrix: both triangles, derived energy, the stored second triangle."""

import pytest
import torch
from hypothesis import given

from prunekit.statistics import ColumnEnergy, Gram
from tests.support.statistics import accumulate, assert_same, features, inputs, law, seeds, tokens


@law
@given(tokens, features, seeds)
def test_the_sums_are_what_their_formulas_say(count, width, seed):
    x = inputs(count, width, seed)
    assert torch.equal(accumulate(Gram, x).full, x.T @ x)
    assert torch.equal(accumulate(ColumnEnergy, x).total, (x * x).sum(0))


def test_both_triangles_of_a_wide_gram_matrix_are_there():
    x = inputs(3, 1000, 0)
    assert torch.equal(accumulate(Gram, x).full, x.T @ x)


@law
@given(tokens, features, seeds)
def test_the_column_energy_derived_from_a_gram_matrix_is_the_column_energy(count, width, seed):
    x = inputs(count, width, seed)
    derived = accumulate(Gram, x).derive(ColumnEnergy)
    assert isinstance(derived, ColumnEnergy)
    assert_same(derived, accumulate(ColumnEnergy, x))


def test_a_derived_statistic_is_not_a_view():
    gram = accumulate(Gram, inputs(5, 4, 0))
    before = gram.full.clone()
    derived = gram.derive(ColumnEnergy)
    assert derived is not None
    derived.update(inputs(5, 4, 1))
    assert torch.equal(gram.full, before)


@pytest.mark.parametrize("width", [5, 300])
@pytest.mark.parametrize("between", [False, True])
def test_a_gram_matrix_keeps_a_triangle_for_later(width, between):
    gram, exact = (accumulate(Gram, inputs(7, width, 0)) for _ in range(2))
    gram.full  # noqa: B018  as if the full matrix had been read before
    upper = torch.randn(width, width).triu()
    gram.stash_upper(upper)
    assert torch.equal(gram.total.tril(), exact.full.tril())
    if between:
        assert torch.equal(gram.full, exact.full)
    assert torch.equal(gram.pop_upper(), upper)
    assert torch.equal(gram.full, exact.full)
    assert gram.pop_upper() is None
