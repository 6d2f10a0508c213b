"""Drawing of heat maps as inline SVG."""

import math
import re

from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter

from prunekit.reports.figures.draw import (
    Cell,
    Grid,
    Scale,
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
