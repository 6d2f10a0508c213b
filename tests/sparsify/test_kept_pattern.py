"""A pattern among kept weights: exact counts, and nothing pruned before is kept."""

import pytest
import torch

from prunekit import patterns
from prunekit.sparsify.kept_pattern import KeptPattern


@pytest.mark.parametrize("scope", ["row", "layer", "block"])
def test_of_each_group_as_many_are_pruned_as_without(scope):
    pattern = patterns.parse("unstructured", scope)
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(8, 16, generator=generator)
    before = pattern.keep(torch.rand(8, 16, generator=generator), 0.25)
    keep = KeptPattern(pattern, before).keep(score, 0.5)
    assert not bool((keep & ~before).any())
    assert torch.equal(keep.sum(1), pattern.keep(score, 0.5).sum(1)) or scope != "row"
    assert int(keep.sum()) == 64
    lowest = score.masked_fill(~before, -1)
    assert torch.equal(keep, pattern.keep(lowest, 0.5))


def test_where_more_were_pruned_before_all_of_these_stay_pruned():
    before = torch.zeros(2, 8, dtype=torch.bool)
    before[:, 0] = True
    keep = KeptPattern(patterns.parse("unstructured"), before).keep(torch.rand(2, 8), 0.5)
    assert torch.equal(keep, before)


@pytest.mark.parametrize("text", ["2:4", "unstructured"])
def test_columns_are_chosen_as_by_the_whole(text):
    pattern = patterns.parse(text, "block")
    before = torch.rand(4, 16, generator=torch.Generator().manual_seed(1)) > 0.3
    kept = KeptPattern(pattern, before)
    assert (kept.stride, kept.name, kept.tiled) == (pattern.stride, pattern.name, False)
    score = torch.rand(4, 8, generator=torch.Generator().manual_seed(2))
    keep = kept.keep_columns(score, 8, 0.5)
    part = before[:, 8:]
    assert torch.equal(keep, pattern.keep_columns(score.masked_fill(~part, -1), 8, 0.5) & part)


def test_a_tile_of_which_one_weight_is_pruned_is_compared_by_the_others():
    score = torch.ones(2, 6)
    score[:, :2] = 3
    before = torch.ones(2, 6, dtype=torch.bool)
    before[0, 0] = False
    keep = KeptPattern(patterns.parse("block:2x2"), before).keep(score, 0.5)
    assert keep[:, :2].sum() == 3
    assert not bool(keep[0, 0])
