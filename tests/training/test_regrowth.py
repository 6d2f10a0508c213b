"""Regrowth: exact counts of the pattern, the largest gradients return."""

import pytest
import torch

from prunekit import patterns
from prunekit.training.regrowth import Regrowth, regrown


def layer(pattern, sparsity, share):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 16, generator=generator)
    keep = pattern.keep(weight.abs(), sparsity)
    gradient = torch.randn(8, 16, generator=generator)
    return Regrowth(weight * keep, gradient, keep, share)


@pytest.mark.parametrize(
    ("text", "scope"),
    [("unstructured", "layer"), ("unstructured", "row"), ("2:4", "row"), ("block:2x2", "row")],
)
def test_the_counts_of_each_group_are_those_of_the_pattern(text, scope):
    pattern = patterns.parse(text, scope)
    found = layer(pattern, 0.5, 0.25)
    keep = regrown(pattern, 0.5, found)
    assert int(keep.sum()) == int(found.keep.sum())
    assert not torch.equal(keep, found.keep)
    assert pattern.violations(keep) == 0
    if scope == "row":
        assert torch.equal(keep.sum(1), found.keep.sum(1)) or text == "block:2x2"


def test_those_with_the_largest_gradient_return_and_the_smallest_weights_go():
    pattern = patterns.parse("unstructured", "layer")
    found = layer(pattern, 0.5, 0.25)
    keep = regrown(pattern, 0.5, found)
    returned, left = keep & ~found.keep, ~keep & ~found.keep
    assert int(returned.sum()) == 16
    assert found.gradient.abs()[returned].min() > found.gradient.abs()[left].max()
    dropped, stayed = found.keep & ~keep, found.keep & keep
    assert int(dropped.sum()) == 16
    assert found.weight.abs()[dropped].max() < found.weight.abs()[stayed].min()


def test_weights_without_a_gradient_do_not_return():
    pattern = patterns.parse("unstructured", "layer")
    found = layer(pattern, 0.5, 0.5)
    found.gradient[:, :8] = 0
    keep = regrown(pattern, 0.5, found)
    assert not bool((keep & ~found.keep)[:, :8].any())
    found.gradient[:] = 0
    assert torch.equal(regrown(pattern, 0.5, found), found.keep)


def test_a_share_below_one_weight_changes_nothing():
    pattern = patterns.parse("unstructured", "layer")
    found = layer(pattern, 0.5, 0.001)
    assert regrown(pattern, 0.5, found) is found.keep
