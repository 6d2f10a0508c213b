"""Properties of all statistics, and their lookup by class."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit.distributed.ranks import SINGLE
from prunekit.plugins import subclasses
from prunekit.statistics import (
    ColumnEnergy,
    CrossGram,
    Gram,
    SampledGram,
    StageStatistics,
    Statistic,
    merge,
    minimal_union,
)
from tests.support.statistics import (
    accumulate,
    assert_same,
    features,
    inputs,
    law,
    seeds,
    tokens,
    total,
)
from tests.support.threads import on_ranks

KINDS = subclasses("prunekit.statistics", Statistic)
kinds = pytest.mark.parametrize("kind", KINDS)


def test_the_statistics_are_all_here():
    assert set(KINDS) == {ColumnEnergy, CrossGram, Gram, SampledGram}


@kinds
@law
@given(tokens, tokens, features, seeds)
def test_two_updates_equal_one_of_both(kind, first, second, width, seed):
    whole = inputs(first + second, width, seed)
    assert_same(accumulate(kind, whole[:first], whole[first:]), accumulate(kind, whole))


@kinds
@law
@given(tokens, tokens, features, seeds)
def test_merging_equals_seeing_both_and_commutes(kind, first, second, width, seed):
    whole = inputs(first + second, width, seed)
    a, b = whole[:first], whole[first:]
    one, other = accumulate(kind, a), accumulate(kind, b)
    one.merge(accumulate(kind, b))
    other.merge(accumulate(kind, a))
    assert_same(one, accumulate(kind, whole))
    assert_same(one, other)


@kinds
@law
@given(features, seeds)
def test_merging_leaves_the_other_alone(kind, width, seed):
    other = accumulate(kind, inputs(3, width, seed))
    before = other.total.clone()
    kind(width).merge(other)
    assert other.tokens == 3
    assert torch.equal(other.total, before)


@kinds
@law
@given(tokens, features, seeds, st.randoms(use_true_random=False))
def test_the_order_of_tokens_is_nothing(kind, count, width, seed, random):
    whole = inputs(count, width, seed)
    order = random.sample(range(count), count)
    assert_same(accumulate(kind, whole[order]), accumulate(kind, whole))


@kinds
@law
@given(st.integers(1, 300))
def test_nbytes_is_what_an_instance_holds(kind, width):
    assert kind.nbytes(width) == kind(width).total.untyped_storage().nbytes()


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_summed_in_float32(kind, dtype):
    x = inputs(50, 7, 0)
    if (kind, dtype) == (CrossGram, torch.bfloat16):
        x = x.sign()  # the CPU rounds such sums to 8 bits, so use exact inputs
    statistic = accumulate(kind, x.to(dtype))
    assert statistic.total.dtype == torch.float32
    assert_same(statistic, accumulate(kind, x))


@kinds
def test_sums_in_float32_stay_close_to_float64(kind):
    x = torch.randn(3000, 30, generator=torch.Generator().manual_seed(0))
    exact = x.double().T @ x.double()
    exact = exact.diagonal() if kind is ColumnEnergy else exact
    error = (total(accumulate(kind, *x.split(700))).double() - exact).abs().max()
    assert error <= 1e-6 * exact.abs().max()


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_an_input_that_is_no_number_or_overflows_is_told(kind, value):
    x = inputs(5, 6, 0)
    assert accumulate(kind, x).finite()
    x[3, 4] = value
    assert not accumulate(kind, x).finite()


@kinds
def test_what_a_statistic_contains_is_what_it_derives(kind):
    statistic = accumulate(kind, inputs(5, 4, 0))
    derivable = {other for other in KINDS if statistic.derive(other) is not None}
    assert derivable == kind.contains()


@law
@given(st.lists(st.sampled_from(KINDS)))
def test_union_has_each_kind_once_and_none_that_another_contains(needs):
    found = minimal_union(needs)
    assert len(found) == len(set(found))
    assert set(found) <= set(needs)
    assert found == minimal_union(reversed(needs))
    for kind in needs:
        assert kind in found or any(kind in other.contains() for other in found)
    for kind in found:
        assert not any(kind in other.contains() for other in found)


def test_union_drops_the_column_energy_that_a_gram_matrix_contains():
    assert minimal_union([]) == ()
    assert minimal_union([ColumnEnergy, ColumnEnergy]) == (ColumnEnergy,)
    assert minimal_union([ColumnEnergy, Gram, ColumnEnergy]) == (Gram,)


def test_gathered_statistics_are_looked_up_by_class():
    gram, energy = accumulate(Gram, inputs(5, 4, 0)), accumulate(ColumnEnergy, inputs(5, 4, 0))
    stats = StageStatistics([energy, gram])
    assert stats[Gram] is gram
    assert stats[ColumnEnergy] is energy
    assert list(stats) == [energy, gram]


def test_what_can_be_derived_is_looked_up_too_and_derived_once():
    x = inputs(5, 4, 0)
    stats = StageStatistics([accumulate(Gram, x)])
    assert_same(stats[ColumnEnergy], accumulate(ColumnEnergy, x))
    assert stats[ColumnEnergy] is stats[ColumnEnergy]
    assert [type(statistic) for statistic in stats] == [Gram]


@pytest.mark.parametrize("held", [[], [ColumnEnergy]])
def test_what_was_not_gathered_is_named(held):
    stats = StageStatistics([kind(4) for kind in held])
    with pytest.raises(KeyError, match="Gram was not gathered; declare it in `needs`"):
        stats[Gram]


def test_once_computes_once_for_each_key():
    stats, calls = StageStatistics([]), []

    def compute():
        calls.append(1)
        return len(calls)

    assert [stats.once("a", compute), stats.once("a", compute), stats.once("b", compute)] == [
        1,
        1,
        2,
    ]
    assert StageStatistics([]).once("a", compute) == 3


def test_what_is_dropped_is_gone_with_what_was_made_of_it():
    stats = StageStatistics([accumulate(Gram, inputs(5, 4, 0)), CrossGram(4)])
    assert stats.once(CrossGram, lambda: 1) == stats.once(Gram, lambda: 2) - 1
    stats.drop(CrossGram)
    assert [type(statistic) for statistic in stats] == [Gram]
    assert stats.once(CrossGram, lambda: 3) == 3
    assert stats.once(Gram, lambda: 4) == 2


def test_once_remembers_none():
    stats, calls = StageStatistics([]), []
    for _ in range(2):
        assert stats.once("key", lambda: calls.append(1)) is None
    assert calls == [1]


@kinds
@pytest.mark.parametrize("size", [2, 3])
def test_merging_over_ranks_gives_each_the_sums_of_all(kind, size):
    parts = inputs(10, 300, 0).split([6, 4] if size == 2 else [5, 3, 2])

    def work(ranks):
        statistic = accumulate(kind, parts[ranks.rank])
        merge([statistic], ranks)
        return statistic

    for statistic in on_ranks(size, work):
        assert_same(statistic, accumulate(kind, *parts))


def test_a_single_process_has_nothing_to_merge():
    statistic = accumulate(Gram, inputs(5, 4, 0))
    before = statistic.total.clone()
    merge([statistic], SINGLE)
    assert statistic.tokens == 5
    assert torch.equal(statistic.total, before)
