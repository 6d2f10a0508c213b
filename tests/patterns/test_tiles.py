"""Tiles: sums of scores, shapes, violations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit.errors import ConfigError
from prunekit.patterns import parse, pruned_count
from prunekit.patterns.tiles import Tiles
from tests.support.patterns import law, scores, sparsities, without_lowest

TILES = [("block:2x3", 2, 3), ("block:1x1", 1, 1), ("row", 1, 12), ("column", 8, 1)]


@pytest.mark.parametrize(("text", "rows", "columns"), TILES)
@law
@given(scores(st.just(8), st.just(12)), sparsities)
def test_tiles_with_the_lowest_sums_go_whole(text, rows, columns, score, sparsity):
    pattern = parse(text)
    keep = pattern.keep(score, sparsity)
    assert pattern.violations(keep) == 0
    tiles = score.nan_to_num(nan=-math.inf, posinf=math.inf)
    tiles = tiles.view(8 // rows, rows, 12 // columns, columns)
    sums = tiles.sum((1, 3))  # NaN where inf and -inf are added; it is pruned with the lowest sums
    kept = keep.view(tiles.shape).any(3).any(1)
    assert torch.equal(kept, without_lowest(sums, pruned_count(sparsity, sums.numel())))


def test_a_tile_with_a_nan_goes_first():
    score = torch.full((4, 4), 1.0)
    score[3, 2] = math.nan
    keep = Tiles("block:2x2", 2, 2).keep(score, 0.25)
    assert not keep[2:, 2:].any()
    assert keep.sum() == 12


@pytest.mark.parametrize(
    ("text", "outputs", "inputs", "fits"),
    [
        ("block:2x3", 8, 12, True),
        ("block:2x3", 9, 12, False),
        ("block:2x3", 8, 10, False),
        ("row", 7, 11, True),
        ("column", 7, 11, True),
    ],
)
def test_tiles_fit_where_they_divide(text, outputs, inputs, fits):
    assert (parse(text).why_not_applicable(outputs, inputs) is None) == fits


def test_a_misfit_of_tiles_says_both_sides():
    assert parse("block:2x3").why_not_applicable(9, 10) == (
        "block:2x3 needs outputs and inputs that are multiples of 2 and 3, this layer has 9 and 10"
    )


def test_tiles_that_are_kept_in_part_are_counted():
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[0, 0] = keep[3, 5] = False
    keep[:2, 3:] = False
    assert parse("block:2x3").violations(keep) == 2
    assert parse("row").violations(keep) == 3
    assert parse("column").violations(keep) == 4
    assert parse("unstructured").violations(keep) == 0


@pytest.mark.parametrize("text", ["block:0x4", "block:4x0", "block:0x0"])
def test_empty_blocks_are_refused(text):
    with pytest.raises(ConfigError, match=f'pattern "{text}": a block has at least one row'):
        parse(text)
