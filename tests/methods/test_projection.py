"""The projection finds the nearest matrix that the pattern allows."""

import pytest
import torch
from hypothesis import given
from prunekit_kernels import unpack

from prunekit.methods.layer import Layer
from prunekit.methods.projection import Projection, row_counts
from prunekit.patterns import parse
from prunekit.patterns.tiles import Tiles
from prunekit.statistics import StageStatistics
from tests.support.methods import PATTERNS, expected_count, law, seeds

SHAPE = OUTPUTS, INPUTS = 12, 144


def stacked(pattern, *sparsities, rows=OUTPUTS):
    weight = torch.zeros(rows, INPUTS)
    return [Layer("a", weight, StageStatistics([]), pattern, each) for each in sparsities]


def drawn(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, INPUTS, generator=generator) for _ in range(2))


def largest(pattern, total, sparsity):
    """Return the mask that keeps the most energy, which leaves the nearest matrix."""
    return pattern.keep(total.square() if isinstance(pattern, Tiles) else total.abs(), sparsity)


@pytest.mark.parametrize(
    "pattern", PATTERNS, ids=lambda pattern: f"{pattern.name} {getattr(pattern, 'scope', '')}"
)
@law
@given(seeds)
def test_it_splits_the_sum_into_the_nearest_matrix_and_the_rest(pattern, seed):
    project = Projection(stacked(pattern, 0.5))
    x, dual = drawn(OUTPUTS, seed)
    total = x + dual
    project(x, dual)
    keep = project.keep
    assert torch.equal(keep, largest(pattern, total, 0.5))
    assert int((~keep).sum()) == expected_count(pattern, 0.5, SHAPE)
    torch.testing.assert_close(x, total * keep)
    torch.testing.assert_close(dual, total * ~keep)
    assert not x[~keep].any()
    assert not dual[keep].any()


def test_tiles_are_compared_by_their_energy():
    """One large weight loses more than two small ones with the same sum of magnitudes."""
    layer = Layer("a", torch.zeros(2, 4), StageStatistics([]), parse("block:2x2"), 0.5)
    project = Projection([layer])
    x = torch.tensor([[2.0, 0, 1, 1], [0, 0, 0, 0.5]])
    project(x, torch.zeros(2, 4))
    assert project.keep[:, :2].all()
    assert not project.keep[:, 2:].any()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x8"])
def test_stacked_layers_are_projected_each_by_itself(pattern):
    layers = stacked(parse(pattern, "layer"), 0.25, 0.75, rows=8)
    assert row_counts(layers) == [8, 8]
    project = Projection(layers)
    x, dual = drawn(16, 0)
    parts = [(a.clone(), b.clone()) for a, b in zip(x.split(8), dual.split(8), strict=True)]
    project(x, dual)
    for layer, part, bits, own in zip(layers, x.split(8), project.bits, parts, strict=True):
        alone = Projection([layer])
        alone(*own)
        assert torch.equal(own[0], part)
        assert torch.equal(alone.keep, unpack(bits, INPUTS))
