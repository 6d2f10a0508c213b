"""Numbers read as people write them."""

import math

import pytest

from prunekit import units


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (units.number, 20.7031, "20.70"),
        (units.number, 27113.6, "27,114"),
        (units.number, 0.01234, "0.0123"),
        (units.number, 1.234e-7, "1.23e-07"),
        (units.number, 3e12, "3e+12"),
        (units.number, 0, "0"),
        (units.number, math.inf, "∞"),
        (units.number, "inf", "∞"),
        (units.number, "-inf", "-∞"),
        (units.number, math.nan, "NaN"),
        (units.percent, 0.5, "50.0 %"),
        (units.percent, 0.9996, "100.0 %"),
        (units.percent, 1.0, "100 %"),
        (units.percent, 0, "0 %"),
        (units.count, 210, "210"),
        (units.count, 16384, "16,384"),
        (units.count, 134515008, "134.5 M"),
        (units.count, 8030261248, "8.03 B"),
        (units.size, 512, "512 B"),
        (units.size, 912345678, "912 MB"),
        (units.size, 999_600_000, "1 GB"),
        (units.size, 12_345_678_901, "12.3 GB"),
        (units.duration, 0.05, "0.05 s"),
        (units.duration, 12.34, "12.3 s"),
        (units.duration, 59.96, "1 min 00 s"),
        (units.duration, 95, "1 min 35 s"),
        (units.duration, 3599.7, "1 h 00 min"),
        (units.duration, 7500, "2 h 05 min"),
    ],
)
def test_writes(show, value, text):
    assert show(value) == text


@pytest.mark.parametrize("name", ["number", "percent", "count", "size", "duration"])
def test_nothing_is_a_dash(name):
    assert getattr(units, name)(None) == units.MISSING


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (20.7, 27.1, "+30.9 %"),
        (10, 9.8, "-2.0 %"),
        (10, 1000, "100.00 times"),
        (10, "inf", "+∞"),
        (10, math.nan, "—"),
        (math.inf, 10, "—"),
        (0, 10, "—"),
        (None, 10, "—"),
    ],
)
def test_change(before, after, text):
    assert units.change(before, after) == text
