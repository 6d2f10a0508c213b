"""Format numbers and foreign text for people; ``None`` becomes "—", infinity "∞".

Numbers may be strings: JSON has no infinity, so ``report.json`` writes "inf" and "nan".
"""

import difflib
import json
import math
import re
from collections.abc import Iterable

MISSING = "—"

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that control a terminal or reorder a line; not newline and tab."""

Number = float | str | None
FRACTIONS = frozenset({"accuracy", "exact match", "acc", "acc_norm", "exact_match"})
"""Metrics that are fractions of samples: higher is better; the last three are lm-eval's names."""


def printable(text: str) -> str:
    """Return a text with its control characters escaped, as in Python."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def unicode_text(text: str) -> str:
    """Return a text with lone surrogates escaped, as Python does.

    Names of files that are not UTF-8 hold some, which no file in UTF-8 can.
    """
    return text.encode(errors="backslashreplace").decode()


def json_text(value: object) -> str:
    """Return strict JSON for programs: strings for infinity and NaN.

    They are "inf", "-inf" and "nan".
    """
    return json.dumps(_json_value(value), indent=2, ensure_ascii=False, allow_nan=False)


def _json_value(value: object) -> object:
    """Return a value that strict JSON and UTF-8 can hold."""
    if isinstance(value, dict):
        return {_json_value(key): _json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return unicode_text(value) if isinstance(value, str) else value


def did_you_mean(word: object, options: Iterable[str]) -> str:
    """Return a suggestion of the closest option, empty if none is similar."""
    near = difflib.get_close_matches(str(word), list(options), 1)
    return f' Did you mean "{near[0]}"?' if near else ""


def number(value: Number) -> str:
    """Format a measured number: 27,114, 20.70, or three digits: 0.0123."""
    if value is None:
        return MISSING
    x = float(value)
    if not math.isfinite(x):
        return "NaN" if math.isnan(x) else "∞" if x > 0 else "-∞"
    if x == 0 or abs(x) >= 1e9:
        return f"{x:.3g}"
    if abs(x) >= 1:
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.2f}"
    return f"{x:#.3g}"


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as "80GB", 0 if invalid."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    size = text.strip()
    if not size[-1:].isalpha() or size.lower().endswith("bit"):  # a unit is needed, and of bytes
        return 0
    try:
        return int(TypeAdapter(ByteSize).validate_python(size))
    except (ValidationError, OverflowError):
        return 0


def percent(fraction: Number) -> str:
    """Format a fraction as a percentage: 50.0 %, or 0 % exactly.

    Exactly 0 and 1 have no decimal.
    """
    if fraction is None:
        return MISSING
    x = float(fraction)
    return f"{x:.0%}".replace("%", " %") if x in {0.0, 1.0} else f"{100 * x:.1f} %"


def change(before: Number, after: Number) -> str:
    """Format the relative change: +30.9 %, above tenfold 12.30 times, or "—"."""
    if before is None or after is None:
        return MISSING
    old, new = float(before), float(after)
    if not math.isfinite(old) or math.isnan(new) or old == 0:
        return MISSING
    ratio = new / old - 1
    if ratio == math.inf:
        return "+∞"
    if ratio > 9:
        return f"{number(new / old)} times"
    return f"{100 * ratio:+.1f} %"


def measured(metric: str, value: Number) -> str:
    """Format a measure: fractions of samples in percent, others as numbers."""
    if metric not in FRACTIONS or value is None or not math.isfinite(float(value)):
        return number(value)
    return f"{100 * float(value):.2f} %"


def measured_change(metric: str, before: Number, after: Number) -> str:
    """Format the change of a measure, of fractions in points."""
    if metric not in FRACTIONS or before is None or after is None:
        return change(before, after)
    points = 100 * (float(after) - float(before))
    return f"{points:+.2f} points" if math.isfinite(points) else MISSING


def count(value: Number) -> str:
    """Format a count: 210, 16,384, 134.5 M, 8.03 B."""
    if value is None:
        return MISSING
    x = int(value)
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if x >= unit:
            return f"{x / unit:.4g} {name}"
    return f"{x:,}"


def size(value: Number) -> str:
    """Format bytes in decimal units: 512 B, 900 MB, 12.4 GB."""
    if value is None:
        return MISSING
    x, unit = float(value), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if x < 999.5:
            break
        x, unit = x / 1000, larger
    return f"{x:.3g} {unit}"


def duration(seconds: Number) -> str:
    """Format seconds: 12.3 s, 1 min 35 s, 2 h 05 min."""
    if seconds is None or not math.isfinite(x := float(seconds)):
        return MISSING
    if x < 59.95:
        return f"{x:.2f} s" if x < 9.995 else f"{x:.1f} s"
    minutes, rest = divmod(round(x), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
