"""Laws of all pruning methods."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prunekit.methods import methods
from prunekit.methods.admm import Admm
from prunekit.methods.alps import Alps
from prunekit.methods.layer import Layer
from prunekit.methods.magnitude import Magnitude
from prunekit.methods.random import Random
from prunekit.methods.ria import Ria
from prunekit.methods.sparsegpt import SparseGPT
from prunekit.methods.wanda import Wanda
from prunekit.patterns import parse
from prunekit.patterns.unstructured import Unstructured
from prunekit.statistics import StageStatistics
from tests.support.methods import (
    INPUTS,
    OUTPUTS,
    PATTERNS,
    assert_sound,
    every_method,
    every_pattern,
    law,
    layer,
    seeds,
    tokens,
    weights,
)


def test_the_methods_are_all_here():
    assert set(methods().values()) == {Admm, Alps, Magnitude, Random, Wanda, Ria, SparseGPT}


@every_pattern
@every_method
@pytest.mark.parametrize("sparsity", [0.5, 0.77])
def test_every_method_prunes_exactly_what_every_pattern_asks(method, pattern, sparsity):
    given = layer(pattern, sparsity)
    before = given.weight.clone()
    found = method.prune(given)
    assert_sound(method, given, found)
    assert torch.equal(given.weight, before)


FREE = [pattern for pattern in PATTERNS if pattern.sparsity is None]


@every_method
@pytest.mark.parametrize("pattern", FREE, ids=lambda pattern: f"{pattern.name} {pattern.stride}")
def test_sparsity_zero_changes_nothing_and_one_leaves_nothing(method, pattern):
    x = tokens()
    x[:, 5] = 0
    dense = method.prune(layer(pattern, 0.0, x))
    assert dense.keep.all()
    assert torch.equal(dense.weight, weights())
    empty = method.prune(layer(pattern, 1.0, x))
    assert not empty.keep.any()
    assert not empty.weight.any()


@every_method
@every_pattern
def test_activations_that_are_all_zero_leave_the_count_exact(method, pattern):
    given = layer(pattern, x=torch.zeros(9, INPUTS))
    found = method.prune(given)
    assert_sound(method, given, found)
    assert torch.equal(found.weight, given.weight * found.keep)


@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_token_or_none_is_enough_to_go_on(method, pattern, count):
    given = layer(pattern, x=tokens(count))
    assert_sound(method, given, method.prune(given))


@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x8"])
def test_weights_that_are_all_equal_leave_exactly_half(method, pattern):
    for value in (0.0, 1.0, -3.0):
        given = layer(pattern, weight=torch.full((OUTPUTS, INPUTS), value))
        found = method.prune(given)
        assert_sound(method, given, found)
        assert found.keep.sum() == OUTPUTS * INPUTS // 2


@every_method
@law
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 60), st.floats(0, 1), seeds)
def test_any_shape_is_pruned_exactly(method, outputs, inputs, count, sparsity, seed):
    x, weight = tokens(count, inputs, seed), weights(outputs, inputs, seed)
    for scope in ("row", "layer", "block"):
        given = layer(Unstructured(scope), sparsity, x, weight)
        assert_sound(method, given, method.prune(given))


@every_method
def test_a_weight_that_is_a_view_is_pruned_as_its_copy_is(method):
    stored = weights().T.contiguous()
    view = method.prune(layer("2:4", weight=stored.T))
    assert torch.equal(view.weight, method.prune(layer("2:4")).weight)
    assert torch.equal(stored.T, weights())


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_rows_are_pruned_each_by_itself(method, pattern):
    order = torch.randperm(OUTPUTS, generator=torch.Generator().manual_seed(0))
    straight = method.prune(layer(pattern))
    permuted = method.prune(layer(pattern, weight=weights()[order]))
    assert torch.equal(permuted.keep, straight.keep[order])
    torch.testing.assert_close(permuted.weight, straight.weight[order])


@every_method
def test_nothing_but_what_is_declared_is_read(method):
    whole = layer("2:4")
    needed = StageStatistics(
        statistic for statistic in whole.stats if type(statistic) in method.needs
    )
    given = Layer(whole.name, whole.weight, needed, whole.pattern, whole.sparsity)
    assert torch.equal(method.prune(given).weight, method.prune(whole).weight)


@pytest.mark.parametrize("method", [Wanda(), Ria(), SparseGPT(), Admm(), Alps()])
def test_without_its_statistic_a_method_names_it(method):
    given = Layer("layer", weights(), StageStatistics([]), parse("2:4"), 0.5)
    with pytest.raises(KeyError, match="was not gathered; declare it in `needs`"):
        method.prune(given)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (SparseGPT, {"damping": -0.1}),
        (SparseGPT, {"damping": 1.1}),
        (Ria, {"activation_power": -1}),
        (Wanda, {"damping": 0.1}),
        (Admm, {"iterations": 0}),
        (Admm, {"first_penalty": 0}),
        (Alps, {"damping": -0.1}),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind, wrong):
    with pytest.raises(ValidationError):
        kind(**wrong)


def test_methods_compare_in_the_published_groups():
    scopes = {name: kind.scope for name, kind in methods().items()}
    assert scopes == {
        "admm": "layer",
        "alps": "layer",
        "magnitude": "layer",
        "random": "layer",
        "ria": "row",
        "sparsegpt": "block",
        "wanda": "row",
    }
