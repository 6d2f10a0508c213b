"""Human-readable formatting of numbers."""

import math

import pytest

from prunekit import formatting


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (formatting.number, 20.7031, "20.70"),
        (formatting.number, 27113.6, "27,114"),
        (formatting.number, 0.01234, "0.0123"),
        (formatting.number, 1.234e-7, "1.23e-07"),
        (formatting.number, 3e12, "3e+12"),
        (formatting.number, 0, "0"),
        (formatting.number, math.inf, "∞"),
        (formatting.number, "inf", "∞"),
        (formatting.number, "-inf", "-∞"),
        (formatting.number, math.nan, "NaN"),
        (formatting.percent, 0.5, "50.0 %"),
        (formatting.percent, 0.9996, "100.0 %"),
        (formatting.percent, 1.0, "100 %"),
        (formatting.percent, 0, "0 %"),
        (formatting.count, 210, "210"),
        (formatting.count, 16384, "16,384"),
        (formatting.count, 134515008, "134.5 M"),
        (formatting.count, 8030261248, "8.03 B"),
        (formatting.size, 512, "512 B"),
        (formatting.size, 912345678, "912 MB"),
        (formatting.size, 999_600_000, "1 GB"),
        (formatting.size, 12_345_678_901, "12.3 GB"),
        (formatting.duration, 0.05, "0.05 s"),
        (formatting.duration, 12.34, "12.3 s"),
        (formatting.duration, 59.96, "1 min 00 s"),
        (formatting.duration, 95, "1 min 35 s"),
        (formatting.duration, 3599.7, "1 h 00 min"),
        (formatting.duration, 7500, "2 h 05 min"),
    ],
)
def test_writes(show, value, text):
    assert show(value) == text


@pytest.mark.parametrize("name", ["number", "percent", "count", "size", "duration"])
def test_nothing_is_a_dash(name):
    assert getattr(formatting, name)(None) == formatting.MISSING


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
    assert formatting.change(before, after) == text


@pytest.mark.parametrize(("text", "shown"), [("é", "é"), ("a\udcff", "a\\udcff"), ("", "")])
def test_a_text_that_is_not_unicode_is_escaped(text, shown):
    assert formatting.unicode_text(text) == shown


def test_fractions_of_samples_are_percentages_that_change_by_points():
    assert formatting.measured("accuracy", 0.88876) == "88.88 %"
    assert formatting.measured("exact match", None) == "—"
    assert formatting.measured("loss", 0.29278) == "0.293"
    assert formatting.measured_change("accuracy", 0.88876, 0.8761) == "-1.27 points"
    assert formatting.measured_change("accuracy", 0.5, "nan") == "—"
    assert formatting.measured_change("exact match", None, 0.5) == "—"
    assert formatting.measured_change("loss", 2, 3) == "+50.0 %"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("80GB", 80 * 10**9),
        (" 1.5 gib", 3 * 2**29),
        ("7k", 7000),
        ("80", 0),
        ("80Gbit", 0),
        ("GB", 0),
        ("-1GB", 0),
        ("many", 0),
        ("", 0),
    ],
)
def test_sizes_in_words_need_a_unit_of_bytes(text, found):
    assert formatting.parse_bytes(text) == found
