"""Unstructured masks: groups, counts, windows of columns."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from prunekit.patterns import parse, pruned_count
from prunekit.patterns.unstructured import BLOCK_COLUMNS, Unstructured
from tests.support.patterns import (
    SCOPES,
    groups,
    law,
    scopes,
    scores,
    seeds,
    sparsities,
    without_lowest,
)


@scopes
@law
@given(scores(), sparsities)
def test_unstructured_prunes_the_lowest_of_each_group(scope, score, sparsity):
    keep = Unstructured(scope).keep(score, sparsity)
    for group, mask in zip(groups(score, scope), groups(keep, scope), strict=True):
        assert torch.equal(mask, without_lowest(group, pruned_count(sparsity, group.numel())))


@scopes
@law
@given(scores(st.integers(1, 5), st.integers(100, 400), 1000), sparsities)
def test_unstructured_counts_are_exact_whatever_the_size(scope, score, sparsity):
    keep = Unstructured(scope).keep(score, sparsity)
    if scope == "row":
        assert (~keep).sum(1).tolist() == [pruned_count(sparsity, score.shape[1])] * len(score)
    assert int((~keep).sum()) == (
        pruned_count(sparsity, score.shape[1]) * len(score)
        if scope == "row"
        else pruned_count(sparsity, score.numel())
    )
    for group, mask in zip(groups(score, scope), groups(keep, scope), strict=True):
        gone = sparsity * group.numel()
        assert abs(int((~mask).sum()) - gone) < 1 + 1e-6
        worst = group.nan_to_num(nan=-1)[mask].min() if mask.any() else math.inf
        assert not (group.nan_to_num(nan=-1)[~mask] > worst).any()


@scopes
@law
@given(st.integers(1, 5), st.integers(1, 400), sparsities)
@example(3, 129, 0.29)
def test_windows_of_columns_add_up_to_the_count_of_the_whole(scope, outputs, inputs, sparsity):
    pattern = Unstructured(scope)
    score = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(inputs))
    parts = [
        pattern.keep_columns(score[:, start : start + BLOCK_COLUMNS], start, sparsity)
        for start in range(0, inputs, BLOCK_COLUMNS)
    ]
    keep = torch.cat(parts, dim=1)
    assert keep.shape == score.shape
    assert keep.sum() == pattern.keep(score, sparsity).sum()
    if scope == "row":
        assert torch.equal(keep.sum(1), pattern.keep(score, sparsity).sum(1))


def test_only_scopes_that_look_at_some_columns_have_a_stride():
    assert Unstructured("row").stride == Unstructured("block").stride == BLOCK_COLUMNS
    assert Unstructured("layer").stride is None


@scopes
@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
def test_of_equal_scores_exactly_half_stay_and_of_these_the_first(scope, value):
    score = torch.full((4, 8), value)
    keep = Unstructured(scope).keep(score, 0.5)
    assert keep.sum() == 16
    first = keep[:, :4] if scope == "row" else keep[:2]
    assert first.all()


@pytest.mark.parametrize("scope", SCOPES)
@given(seed=seeds, sparsity=sparsities)
@law
def test_a_higher_sparsity_keeps_a_part_of_what_a_lower_one_keeps(scope, seed, sparsity):
    score = torch.randint(0, 9, (4, 150), generator=torch.Generator().manual_seed(seed)).float()
    pattern = Unstructured(scope)
    more, less = pattern.keep(score, sparsity / 2), pattern.keep(score, sparsity)
    if scope == "block":  # counts of later windows are rounded cumulatively with the earlier ones
        assert int((less & ~more).sum()) <= 1
    else:
        assert not (less & ~more).any()


@scopes
def test_the_scope_reaches_unstructured(scope):
    assert parse("unstructured", scope).scope == scope
