"""Properties of all patterns: exact counts, ties, spellings."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prunekit_kernels.selection import keep_highest

from prunekit.errors import ConfigError
from prunekit.patterns import parse, pruned_count, spellings
from prunekit.patterns.unstructured import Unstructured
from tests.support.patterns import SCOPES, law, scores, seeds, sparsities, without_lowest


@law
@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_k_of_n_is_exactly_k(k, n):
    assert pruned_count(k / n, n) == min(k, n)


@law
@given(sparsities, st.integers(0, 10**6))
def test_the_count_is_within_one_of_the_sparsity(sparsity, size):
    count = pruned_count(sparsity, size)
    assert 0 <= count <= size
    assert sparsity * size - 1 < count <= sparsity * size + 1e-6


@pytest.mark.parametrize(
    ("sparsity", "size", "count"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.5, 5, 2), (0.7, 10, 7), (0, 9, 0), (1, 9, 9), (1, 0, 0)],
)
def test_products_that_round_down_lose_nothing(sparsity, size, count):
    assert math.floor(0.29 * 100) == 28
    assert pruned_count(sparsity, size) == count


@law
@given(scores(), st.integers(-1, 13))
def test_the_highest_stay_ties_keep_the_lower_index_and_nan_goes_first(score, kept):
    pruned = score.shape[1] - max(0, min(kept, score.shape[1]))
    expected = torch.cat([without_lowest(row, pruned) for row in score.split(1)])
    assert torch.equal(keep_highest(score, kept), expected)


def test_of_nothing_nothing_is_chosen():
    assert keep_highest(torch.zeros(3, 0), 0).shape == (3, 0)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:1x1", "block:2x2"])
def test_the_scores_are_left_alone(pattern):
    score = torch.tensor([[1.0, math.nan, 3, 3], [2, math.inf, 0, 0]])
    before = score.clone()
    parse(pattern).keep(score, 0.5)
    assert torch.equal(score.nan_to_num(nan=-1), before.nan_to_num(nan=-1))


PATTERNS = [
    *(Unstructured(scope) for scope in SCOPES),
    *map(parse, ["2:4", "1:2", "5:8", "block:2x4", "row", "column"]),
]
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
FREE = [pattern for pattern in PATTERNS if pattern.sparsity is None]


@pytest.mark.parametrize("pattern", FREE, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize(("sparsity", "stays"), [(0.0, True), (1.0, False)])
def test_sparsity_zero_keeps_all_and_one_keeps_nothing(pattern, sparsity, stays):
    keep = pattern.keep(torch.zeros(6, 136), sparsity)
    assert keep.dtype == torch.bool
    assert keep.all() if stays else not keep.any()


@patterns
@given(seed=seeds)
@law
def test_chosen_masks_do_not_break_their_pattern(pattern, seed):
    score = torch.randint(0, 4, (8, 16), generator=torch.Generator().manual_seed(seed)).float()
    assert pattern.why_not_applicable(8, 16) is None
    assert pattern.violations(pattern.keep(score, 0.5)) == 0


@pytest.mark.parametrize("pattern", [Unstructured("row"), parse("2:4"), parse("row")])
@given(seed=seeds, random=st.randoms(use_true_random=False))
@law
def test_permuting_rows_permutes_the_mask(pattern, seed, random):
    score = torch.rand(7, 16, generator=torch.Generator().manual_seed(seed))
    order = random.sample(range(7), 7)
    assert torch.equal(pattern.keep(score[order], 0.4), pattern.keep(score, 0.4)[order])


@patterns
@given(seed=seeds, power=st.integers(-20, 20))
@law
def test_scaling_the_scores_changes_nothing(pattern, seed, power):
    score = torch.rand(8, 16, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(pattern.keep(score * 2.0**power, 0.5), pattern.keep(score, 0.5))


@pytest.mark.parametrize(
    "text", ["unstructured", "2:4", "4:8", "16:32", "block:16x4", "row", "column"]
)
def test_a_pattern_is_named_as_it_is_spelled(text):
    assert parse(text).name == text


@pytest.mark.parametrize(
    "text", ["nonsense", "", "2:", ":4", "2:4:8", "-2:4", "2.0:4", "block:4", "rows", " 2:4"]
)
def test_what_is_no_pattern_is_refused_with_the_choice(text):
    with pytest.raises(ConfigError) as refused:
        parse(text)
    assert str(refused.value).startswith(f'"{text}" is not a pattern. Choose: ')
    assert all(spelling in str(refused.value) for spelling in spellings())
