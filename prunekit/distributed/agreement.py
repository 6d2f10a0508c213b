"""Facts that must be the same on all ranks, compared by name."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

MOST_DIFFERENCES = 8
"""Number of facts that a message lists."""
LONGEST_VALUE = 80
"""Characters of a value that a message shows."""


def flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the facts of nested tables, as JSON, by dotted name."""
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, sort_keys=True, default=str)


def find_differences(every: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[str]:
    """Return a line for each fact that differs between ranks.

    The line has its values and the ranks that have them.

    Args:
        every: The facts of each rank, by dotted name.
        names: Name of each rank.
    """
    keys = dict.fromkeys(key for facts in every for key in facts)
    different = [key for key in keys if len({facts.get(key) for facts in every}) > 1]
    lines = [_describe(key, every, names) for key in islice(different, MOST_DIFFERENCES)]
    if (more := len(different) - MOST_DIFFERENCES) > 0:
        lines.append(f"and {more} more")
    return lines


def _describe(key: str, every: Sequence[Mapping[str, str]], names: Sequence[str]) -> str:
    holders: dict[str | None, list[str]] = {}
    for facts, name in zip(every, names, strict=True):
        holders.setdefault(facts.get(key), []).append(name)
    shown = [f"{_shorten(value)} on {', '.join(ranks)}" for value, ranks in holders.items()]
    return f"{key}: {'; '.join(shown)}"


def _shorten(value: str | None) -> str:
    if value is None:
        return "not set"
    return value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}…"
