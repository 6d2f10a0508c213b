"""Heat maps of layers: layout, labels and color scales."""

import re

import pytest

from prunekit import formatting
from prunekit.reports.figures import layers as figures

GREY = "#808080"


def layer(name, sparsity=0.5, error=0.1):
    return {"name": name, "sparsity": sparsity, "relative_error": error}


def fills(svg):
    """Return the fill color of each cell by tooltip."""
    return dict(re.findall(r"<title>([^<]*)</title><path[^>]*fill: (#\w+)", svg))


def test_rows_are_blocks_and_columns_linears():
    names = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("attn.q", "mlp.up")]
    grid = figures.grid([layer(name) for name in names], "sparsity", formatting.percent)
    assert (grid.rows, grid.columns) == (["0", "1"], ["q", "up"])
    assert [(cell.row, cell.column) for cell in grid.cells] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert grid.cells[3].tip == "model.layers.1.mlp.up: 50.0 %"


def test_stacks_and_alike_linears_are_told_apart():
    names = [
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
    ]
    grid = figures.grid([layer(name) for name in names], "sparsity", formatting.percent)
    assert grid.rows == ["encoder 0", "decoder 0"]
    assert grid.columns == ["SelfAttention.q", "EncDecAttention.q"]


def test_experts_share_a_cell_with_their_mean():
    experts = [layer(f"layers.0.experts.{i}.up", error=error) for i, error in enumerate((1, 3))]
    (cell,) = figures.grid(experts, "relative_error", formatting.number).cells
    assert cell.value == 2
    assert cell.tip == "layers.0.experts.*.up, mean of 2: 2.00"


def test_a_layer_outside_every_block_has_a_row():
    grid = figures.grid([layer("lm_head")], "sparsity", formatting.percent)
    assert (grid.rows, grid.columns) == ([""], ["lm_head"])


@pytest.mark.parametrize("blocks", [1, 6, 80])
def test_every_layer_is_drawn_with_its_tooltip(blocks):
    layers = [layer(f"h.{i}.{part}", 0.3) for i in range(blocks) for part in "abcd"]
    for svg in (figures.sparsity_map(layers), figures.error_map(layers)):
        assert len(fills(svg)) == 4 * blocks
    assert "h.0.a: 30.0 %" in fills(figures.sparsity_map(layers))


def test_more_is_another_colour_and_unknown_is_grey():
    errors = (0.001, 1.0, None, float("nan"), float("inf"), 0.0)
    svg = figures.error_map([layer(f"h.{i}.a", error=error) for i, error in enumerate(errors)])
    low, high, none, nan, inf, zero = fills(svg).values()
    assert low == zero
    assert high == inf
    assert none == nan == GREY
    assert len({low, high, GREY}) == 3


def test_a_small_difference_in_sparsity_does_not_span_the_colours():
    svg = figures.sparsity_map([layer("h.0.a", 0.5), layer("h.1.a", 0.5001)])
    assert len(set(fills(svg).values())) == 1


@pytest.mark.parametrize("error", [None, 0.0, float("nan")])
def test_no_error_map_without_an_error(error):
    assert figures.error_map([layer("h.0.a", error=error)]) is None
