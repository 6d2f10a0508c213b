"""Refined weights: least squares on the mask."""

import pytest
import torch
from pydantic import ValidationError

import prunekit
from prunekit.config.prune_table import Prune
from prunekit.errors import ConfigError
from prunekit.methods import methods
from prunekit.methods.layer import Pruned
from prunekit.methods.refine import refine
from prunekit.sparsify.recipe import Recipe
from prunekit.statistics import Gram
from tests.support.architectures import tiny
from tests.support.methods import INPUTS, PATTERNS, error, layer, tokens, weights

HALF = {"pattern": "unstructured", "sparsity": 0.5}


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("kind", methods().values(), ids=lambda kind: kind.name)
def test_any_mask_stays_and_errs_less(kind, pattern):
    given = layer(pattern, 0.6, x=tokens(2000))
    found = kind().prune(given)
    before = found.weight.clone()
    better = refine(given, found, damping=0.001)
    assert torch.equal(found.weight, before)
    assert torch.equal(better.keep, found.keep)
    assert not better.weight[~found.keep].any()
    if pattern.name != "row":  # rows that go leave nothing to make up for
        # What it lowers is the damped error, of which this is all but a ten-thousandth.
        assert error(given, better) <= (1 + 2e-4) * error(given, found)


def test_is_least_squares_on_the_mask():
    given = layer("2:4", x=tokens(2000))
    keep = given.pattern.keep(given.weight.abs(), 0.5)
    found = refine(given, Pruned(given.weight * keep, keep), damping=0.01, iterations=200)
    gram = given.stats[Gram].full.double()
    gram += 0.01 * gram.diagonal().mean() * torch.eye(INPUTS)
    for row, kept, better in zip(given.weight.double(), keep, found.weight, strict=True):
        best = torch.linalg.solve(gram[kept][:, kept], (gram @ row)[kept])
        torch.testing.assert_close(better[kept].double(), best, rtol=1e-3, atol=1e-3)


def test_leaves_a_dense_layer_as_it_is_to_the_bit():
    dense = Pruned(weights(), torch.ones_like(weights(), dtype=torch.bool), {"damping": 0.1})
    found = refine(layer("unstructured", 0.0), dense)
    assert torch.equal(found.weight, weights())
    assert found.facts == {"damping": 0.1}


def test_needs_the_gram_matrix_whatever_the_method():
    for method in ("magnitude", "wanda", "sparsegpt"):
        section = {"method": method, "refine": "pcg", "measure_error": False, **HALF}
        assert Recipe.of(Prune.model_validate(section), calibrated=True).needs == (Gram,)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_whole_model_errs_less(method):
    ids = torch.randint(0, 50, (4, 32), generator=torch.Generator().manual_seed(0))
    plain, refined = (
        prunekit.prune(tiny("llama"), ids, method=method, **HALF, **more)
        for more in ({}, {"refine": "pcg"})
    )
    for before, after in zip(plain[:4], refined[:4], strict=True):  # the first block, same inputs
        assert after["sparsity"] == before["sparsity"]
        assert after["relative_error"] <= before["relative_error"]
    assert refined[0]["relative_error"] < 0.9 * plain[0]["relative_error"]


def test_without_tokens_it_says_what_needs_them():
    with pytest.raises(ConfigError, match="refine pcg: needs calibration tokens"):
        prunekit.prune(tiny("llama"), method="magnitude", refine="pcg", **HALF)


def test_is_pcg_or_nothing():
    section = {"method": "magnitude", **HALF}
    assert Prune.model_validate(section).refine is None
    with pytest.raises(ValidationError, match="refine"):
        Prune.model_validate({**section, "refine": "cg"})
