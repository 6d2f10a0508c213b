"""Drawing of heat maps and curves as inline SVG."""

import math
import re

import pytest
from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter

from prunekit import formatting
from prunekit.reports.figures.draw import (
    Axis,
    Cell,
    Curve,
    Grid,
    Scale,
    curves,
    draw,
    value_range,
)

SCALE = Scale("x", "viridis", Normalize(0, 1), FuncFormatter(lambda x, _: f"{x:g}"))


def test_text_takes_font_and_colour_of_the_page():
    svg = draw(Grid(["0"], ["a"], [Cell(0, 0, 0.5, "h.0.a")]), SCALE)
    assert "currentColor" in svg
    assert not re.search("font-family|<style|xmlns|http", svg)


def test_labels_of_narrow_columns_stand_upright_and_do_not_lie_on_each_other():
    def turned(columns):
        cells = [Cell(0, place, 0.5, "") for place in range(columns)]
        grid = Grid(["a"], [f"word {place}" for place in range(columns)], cells, square=True)
        return {*re.findall(r"rotate\((-\d+)\b", draw(grid, SCALE))} - {"-0"}

    assert turned(6) == {"-45"}
    assert turned(20) == {"-90"}


def test_the_range_leaves_out_unmeasured_infinite_and_low_values():
    values = (None, math.nan, math.inf, 0.0, 0.5, 2.0)
    grid = Grid(["0"], ["a"], [Cell(0, 0, value, "") for value in values])
    assert value_range(grid) == (0.0, 2.0)
    assert value_range(grid, above=0.0) == (0.5, 2.0)
    assert value_range(grid, above=2.0) is None


def test_a_cell_with_a_frame_is_drawn_with_a_line_of_its_color():
    cells = [Cell(0, 0, 0.5, "kept"), Cell(0, 1, 0.5, "removed", "#d62828")]
    svg = draw(Grid(["0"], ["a", "b"], cells), SCALE)
    assert svg.count("#d62828") == 1


def test_curves_have_a_point_for_each_measured_value_and_a_dashed_dense_line():
    line = Curve("#0072b2", [(0.25, 3.0), (0.5, 4.0), (0.75, None)], ["a", "b", "c"])
    svg = curves([line], 2.0, Axis("loss", formatting.number))
    assert re.findall(r"<title>(\w)</title>", svg)[:2] == ["a", "b"]
    assert "stroke-dasharray" in svg
    assert "stroke-dasharray" not in curves([line], None, Axis("loss", formatting.number))


@pytest.mark.parametrize(("text", "tick"), [("4.00", "4"), ("0.50", "0.5"), ("1.2 k", "1.2 k")])
def test_ticks_have_no_needless_decimals(text, tick):
    value = float(text.split()[0])
    svg = curves([Curve("#0072b2", [(0.0, value)], ["x"])], None, Axis("y", lambda _: text))
    assert f">{tick}</text>" in svg
