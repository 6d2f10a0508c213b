"""Drawing of curves as inline SVG."""

import re

import pytest

from prunekit import formatting
from prunekit.reports.figures.lines import Axis, Curve, curves

STEPS = Axis("loss", formatting.number, steps=True)


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


def test_ticks_of_a_logarithmic_axis_are_plain_numbers():
    over = Axis("loss", formatting.number, wide=True, steps=True)
    points = [(0.0, 4.5), (10.0, 0.3), (20.0, 0.02)]
    svg = curves([Curve("#0072b2", points, ["a", "b", "c"])], None, over)
    assert "math" not in svg
    assert {">0.05</text>", ">0.5</text>", ">2</text>"} <= {*re.findall(">[0-9.]+</text>", svg)}


def test_a_band_has_no_dots_and_lets_another_line_show():
    points = [(0.0, 0.25), (10.0, 0.5)]
    band = Curve("#d55e00", points, ["a", "b"], dots=False, stairs=True, band=True)
    svg = curves([band, Curve("#0072b2", points, ["c", "d"], stairs=True)], None, STEPS)
    assert re.findall(r"<title>(\w)</title>", svg) == ["c", "d"]
    assert "stroke-opacity: 0.45" in svg


def test_dots_are_small_where_there_are_many():
    few, many = ([(float(x), 1.0) for x in range(count)] for count in (2, 100))
    drawn = [
        curves([Curve("#0072b2", each, ["x"] * len(each))], None, STEPS) for each in (few, many)
    ]
    sizes = [len(re.findall("<use", svg)) for svg in drawn]
    assert sizes[1] > sizes[0]
    assert "M 0 2.5" in drawn[0]
    assert "M 0 1.25" in drawn[1]


def test_an_area_of_deviation_lies_within_the_axes():
    line = Curve("#0072b2", [(0.25, 1.0), (0.5, 1.0)], ["a", "b"], spread=[4.0, None])
    svg = curves([line], None, Axis("loss", lambda value: f"{value:g}"))
    assert ">5</text>" in svg
