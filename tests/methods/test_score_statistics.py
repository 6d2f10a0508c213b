"""Statistics of scores: those of numpy's definitions, whoever has the rows."""

import math

import pytest
import torch

from prunekit.methods import Scored
from prunekit.methods import base as bases
from prunekit.methods.score_statistics import (
    KEY,
    row_statistics,
    summarized,
    unit_statistics,
    with_scores,
)
from tests.support.methods import every_method, layer

SCORES = torch.rand(7, 33, generator=torch.Generator().manual_seed(1)) * 5 - 1


def expected(scores):
    exact = scores.double()
    return {
        "min": float(exact.min()), "max": float(exact.max()),
        "mean": float(exact.mean()), "std": float(exact.std(unbiased=False)),
    }  # fmt: skip


def test_figures_are_those_of_all_scores():
    found = summarized(row_statistics(SCORES), SCORES.numel())
    assert found == pytest.approx(expected(SCORES), rel=1e-6)
    assert unit_statistics(SCORES[0]) == pytest.approx(expected(SCORES[0]), rel=1e-6)
    assert unit_statistics(torch.tensor([2.0]))["std"] == 0


def test_rows_of_several_ranks_have_the_figures_of_one():
    parts = [row_statistics(each) for each in SCORES.split([2, 4, 1])]
    whole = summarized(row_statistics(SCORES), SCORES.numel())
    assert with_scores({KEY: parts[0], "a": 1.0}, lambda _: torch.cat(parts), 231) == {
        "a": 1.0,
        KEY: whole,
    }
    assert with_scores({"damping": 0.1}, lambda _: 1 / 0, 231) == {"damping": 0.1}


def test_scores_that_are_not_finite_are_seen():
    scores = SCORES.clone()
    scores[3, 4] = torch.inf
    found = summarized(row_statistics(scores), scores.numel())
    assert found["max"] == math.inf
    scores[0, 0] = torch.nan
    assert math.isnan(summarized(row_statistics(scores), scores.numel())["mean"])


@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_each_method_with_scores_measures_those_that_it_compares(method, pattern, monkeypatch):
    monkeypatch.setattr(bases, "SCORES_AT_ONCE", 300)
    given = layer(pattern)
    facts = method.prune(given).facts
    assert (KEY in facts) == isinstance(method, Scored)
    if isinstance(method, Scored):
        found = summarized(facts[KEY], given.weight.numel())
        assert found == pytest.approx(expected(method.score(given)), rel=1e-6)
