"""Factors and inverses are computed by one rank, and equal on all."""

import pytest
import torch
from prunekit_kernels import damped_inverse, inverse_factor, unit_scale

from prunekit.distributed.ranks import SINGLE
from prunekit.methods.layer import Layer
from prunekit.methods.shared_factors import precompute_factors, shared_factor, shared_inverses
from prunekit.patterns import parse
from prunekit.statistics import Gram, StageStatistics
from tests.support.methods import tokens
from tests.support.threads import on_ranks

WIDTHS = [24, 300, 40]  # one of them more than a panel
ranks_of = pytest.mark.parametrize("size", [2, 3])


def statistics(width, ranks=SINGLE):
    gram = Gram(width)
    gram.update(tokens(2 * width, width))
    return StageStatistics([gram], ranks=ranks)


def exact(width):
    return inverse_factor(statistics(width)[Gram].total, 0.01)


class Counted:
    """Computes factors of layers, and remembers the widths."""

    def __init__(self):
        self.widths = []

    def __call__(self, layer):
        self.widths.append(layer.weight.shape[1])
        return inverse_factor(layer.stats[Gram].total, 0.01)


def layers_of(ranks):
    pattern = parse("2:4")
    return [
        Layer(f"{width}", torch.empty(8, width), statistics(width, ranks), pattern, 0.5)
        for width in WIDTHS
    ]


def test_a_single_process_computes_a_factor_once_for_each_key():
    stats, calls = statistics(24), []

    def compute():
        calls.append(1)
        return exact(24)

    first = shared_factor(stats, "a", compute)
    assert shared_factor(stats, "a", compute) is first
    shared_factor(stats, "b", compute)
    assert len(calls) == 2
    assert torch.equal(first[0], exact(24).upper)
    assert first[1] == 0.01


@ranks_of
@pytest.mark.parametrize("ahead", [False, True])
def test_each_factor_is_computed_by_one_rank_and_has_the_same_bits_on_all(size, ahead):
    def work(ranks):
        compute, layers = Counted(), layers_of(ranks)
        if ahead:
            precompute_factors(layers, "key", compute)
            assert compute.widths == sorted(compute.widths, key=WIDTHS.index)
        found = [
            shared_factor(layer.stats, "key", lambda layer=layer: compute(layer))
            for layer in layers
        ]
        grams = [layer.stats[Gram].full for layer in layers]
        return compute.widths, found, grams

    results = on_ranks(size, work)
    assert sorted(width for widths, _, _ in results for width in widths) == sorted(WIDTHS)
    for _, found, grams in results:
        for (upper, damping), gram, width in zip(found, grams, WIDTHS, strict=True):
            assert torch.equal(upper, exact(width).upper)
            assert damping == 0.01
            assert torch.equal(gram, statistics(width)[Gram].full)


def test_the_widest_factor_is_the_whole_share_of_a_rank():
    def work(ranks):
        compute = Counted()
        precompute_factors(layers_of(ranks), "key", compute)
        return compute.widths

    assert sorted(on_ranks(2, work)) == [[24, 40], [300]]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_failure_on_one_rank_is_raised_on_all(ahead):
    def fail(layer):
        raise ArithmeticError("not positive definite")

    def work(ranks):
        layers = layers_of(ranks)
        if ahead:
            precompute_factors(layers, "key", fail)
        with pytest.raises(ArithmeticError, match="not positive definite"):
            shared_factor(layers[0].stats, "key", lambda: fail(layers[0]))
        return True

    assert all(on_ranks(2, work))


def inverting(width=40):
    """Return a Gram matrix, a function that inverts it, and the list of what it inverted."""
    gram = statistics(width)[Gram].full
    scale, calls = unit_scale(gram, 0.1), []

    def invert(penalty, spare):
        calls.append(penalty)
        return damped_inverse(gram, scale, penalty, spare, scale)

    return gram, invert, calls


def test_a_single_process_inverts_by_itself():
    gram, invert, _ = inverting()
    assert shared_inverses(invert, gram, lambda penalty, count: [penalty], SINGLE) is invert


@ranks_of
def test_inverses_are_computed_in_turn_and_have_the_same_bits_on_all(size):
    penalties = [0.1, 0.2, 0.4, 0.8, 1.6]

    def upcoming(penalty, count):
        return penalties[penalties.index(penalty) :][:count]

    def work(ranks):
        gram, invert, calls = inverting()
        shared = shared_inverses(invert, gram, upcoming, ranks)
        found, spare = [], None
        for penalty in penalties:
            spare = shared(penalty, spare)
            found.append(spare.clone())
        return found, calls

    results = on_ranks(size, work)
    assert sorted(each for _, calls in results for each in calls) == penalties
    assert max(len(calls) for _, calls in results) <= -(-len(penalties) // size)
    _, invert, _ = inverting()
    for found, _ in results:
        for penalty, inverse in zip(penalties, found, strict=True):
            assert torch.equal(inverse, invert(penalty, None))


def test_a_penalty_that_was_not_foretold_begins_a_new_round():
    def work(ranks):
        gram, invert, calls = inverting()
        shared = shared_inverses(invert, gram, lambda penalty, count: [penalty, 9.0][:count], ranks)
        found = [shared(penalty, None).clone() for penalty in (0.1, 0.2)]
        return found, calls

    results = on_ranks(2, work)
    assert sorted(each for _, calls in results for each in calls) == [0.1, 0.2, 9.0, 9.0]
    _, invert, _ = inverting()
    for found, _ in results:
        assert torch.equal(found[0], invert(0.1, None))
        assert torch.equal(found[1], invert(0.2, None))


def test_an_inversion_that_fails_on_one_rank_is_raised_on_all():
    def work(ranks):
        gram, _, _ = inverting()

        def invert(penalty, spare):
            raise ArithmeticError("not positive definite")

        shared = shared_inverses(invert, gram, lambda penalty, count: [penalty], ranks)
        with pytest.raises(ArithmeticError, match="not positive definite"):
            shared(0.1, None)
        return True

    assert all(on_ranks(2, work))
