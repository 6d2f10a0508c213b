"""Laws of the statistics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.plugins import subclasses
from prunekit.statistics import (
    ColumnEnergy,
    CrossGram,
    Gram,
    SampledGram,
    StageStatistics,
    Statistic,
    union,
)

KINDS = subclasses("prunekit.statistics", Statistic)
kinds = pytest.mark.parametrize("kind", KINDS)
tokens = st.integers(0, 40)
features = st.integers(1, 20)
seeds = st.integers(0, 1 << 30)
law = settings(deadline=None, max_examples=20)


def inputs(count, width, seed):
    """Return small integers, whose sums are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, (count, width), generator=generator).float()


def seen(kind, *parts):
    statistic = kind(parts[0].shape[1])
    for part in parts:
        if isinstance(statistic, CrossGram):
            statistic.update_pair(part, 2 * part)  # they differ by the part
        else:
            statistic.update(part)
    return statistic


def total(statistic):
    return statistic.full if isinstance(statistic, Gram) else statistic.total


def assert_same(first, second):
    assert first.tokens == second.tokens
    assert torch.equal(total(first), total(second))


def test_the_statistics_are_all_here():
    assert set(KINDS) == {ColumnEnergy, CrossGram, Gram, SampledGram}


@kinds
@law
@given(tokens, tokens, features, seeds)
def test_two_updates_equal_one_of_both(kind, first, second, width, seed):
    whole = inputs(first + second, width, seed)
    assert_same(seen(kind, whole[:first], whole[first:]), seen(kind, whole))


@kinds
@law
@given(tokens, tokens, features, seeds)
def test_merging_equals_seeing_both_and_commutes(kind, first, second, width, seed):
    whole = inputs(first + second, width, seed)
    a, b = whole[:first], whole[first:]
    one, other = seen(kind, a), seen(kind, b)
    one.merge(seen(kind, b))
    other.merge(seen(kind, a))
    assert_same(one, seen(kind, whole))
    assert_same(one, other)


@kinds
@law
@given(features, seeds)
def test_merging_leaves_the_other_alone(kind, width, seed):
    other = seen(kind, inputs(3, width, seed))
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
    assert_same(seen(kind, whole[order]), seen(kind, whole))


@kinds
@law
@given(st.integers(1, 300))
def test_nbytes_is_what_an_instance_holds(kind, width):
    assert kind.nbytes(width) == kind(width).total.untyped_storage().nbytes()


@law
@given(tokens, features, seeds)
def test_the_sums_are_what_their_formulas_say(count, width, seed):
    x = inputs(count, width, seed)
    assert torch.equal(seen(Gram, x).full, x.T @ x)
    assert torch.equal(seen(ColumnEnergy, x).total, (x * x).sum(0))


@law
@given(tokens, features, seeds)
def test_models_that_read_the_same_do_not_differ(count, width, seed):
    statistic = CrossGram(width)
    statistic.update(inputs(count, width, seed))
    statistic.update_pair(*[inputs(count, width, seed)] * 2)
    assert statistic.tokens == 2 * count
    assert not statistic.total.any()


def test_both_triangles_of_a_wide_gram_matrix_are_there():
    x = inputs(3, 1000, 0)
    assert torch.equal(seen(Gram, x).full, x.T @ x)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_summed_in_float32(kind, dtype):
    x = inputs(50, 7, 0)
    if (kind, dtype) == (CrossGram, torch.bfloat16):
        x = x.sign()  # a CPU rounds its sums to 8 bits
    statistic = seen(kind, x.to(dtype))
    assert statistic.total.dtype == torch.float32
    assert_same(statistic, seen(kind, x))


@kinds
def test_sums_in_float32_stay_close_to_float64(kind):
    x = torch.randn(3000, 30, generator=torch.Generator().manual_seed(0))
    exact = x.double().T @ x.double()
    exact = exact.diagonal() if kind is ColumnEnergy else exact
    error = (total(seen(kind, *x.split(700))).double() - exact).abs().max()
    assert error <= 1e-6 * exact.abs().max()


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_an_input_that_is_no_number_or_overflows_is_told(kind, value):
    x = inputs(5, 6, 0)
    assert seen(kind, x).finite()
    x[3, 4] = value
    assert not seen(kind, x).finite()


@law
@given(tokens, features, seeds)
def test_the_column_energy_derived_from_a_gram_matrix_is_the_column_energy(count, width, seed):
    x = inputs(count, width, seed)
    derived = seen(Gram, x).derive(ColumnEnergy)
    assert isinstance(derived, ColumnEnergy)
    assert_same(derived, seen(ColumnEnergy, x))


def test_a_derived_statistic_is_not_a_view():
    gram = seen(Gram, inputs(5, 4, 0))
    before = gram.full.clone()
    derived = gram.derive(ColumnEnergy)
    assert derived is not None
    derived.update(inputs(5, 4, 1))
    assert torch.equal(gram.full, before)


@pytest.mark.parametrize("width", [5, 300])
@pytest.mark.parametrize("between", [False, True])
def test_a_gram_matrix_keeps_a_triangle_for_later(width, between):
    gram, exact = (seen(Gram, inputs(7, width, 0)) for _ in range(2))
    gram.full  # noqa: B018  as one that was asked for before
    upper = torch.randn(width, width).triu()
    gram.stash_upper(upper)
    assert torch.equal(gram.total.tril(), exact.full.tril())
    if between:
        assert torch.equal(gram.full, exact.full)
    assert torch.equal(gram.pop_upper(), upper)
    assert torch.equal(gram.full, exact.full)
    assert gram.pop_upper() is None


@kinds
def test_what_a_statistic_contains_is_what_it_derives(kind):
    statistic = seen(kind, inputs(5, 4, 0))
    derivable = {other for other in KINDS if statistic.derive(other) is not None}
    assert derivable == kind.contains()


@law
@given(st.lists(st.sampled_from(KINDS)))
def test_union_has_each_kind_once_and_none_that_another_contains(needs):
    found = union(needs)
    assert len(found) == len(set(found))
    assert set(found) <= set(needs)
    assert found == union(reversed(needs))
    for kind in needs:
        assert kind in found or any(kind in other.contains() for other in found)
    for kind in found:
        assert not any(kind in other.contains() for other in found)


def test_union_drops_the_column_energy_that_a_gram_matrix_contains():
    assert union([]) == ()
    assert union([ColumnEnergy, ColumnEnergy]) == (ColumnEnergy,)
    assert union([ColumnEnergy, Gram, ColumnEnergy]) == (Gram,)


def test_gathered_statistics_are_looked_up_by_class():
    gram, energy = seen(Gram, inputs(5, 4, 0)), seen(ColumnEnergy, inputs(5, 4, 0))
    stats = StageStatistics([energy, gram])
    assert stats[Gram] is gram
    assert stats[ColumnEnergy] is energy
    assert list(stats) == [energy, gram]


def test_what_can_be_derived_is_looked_up_too_and_derived_once():
    x = inputs(5, 4, 0)
    stats = StageStatistics([seen(Gram, x)])
    assert_same(stats[ColumnEnergy], seen(ColumnEnergy, x))
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
    stats = StageStatistics([seen(Gram, inputs(5, 4, 0)), CrossGram(4)])
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
