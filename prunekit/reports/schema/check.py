"""Check a report against the structure of its kind."""

import json

from pydantic import ValidationError

from prunekit.formatting import printable
from prunekit.reports.schema.runs import Report, SparsifyReport, UnitsReport
from prunekit.reports.schema.sweeps import SweepReport

MAX_DEPTH = 20
"""Levels of lists and tables in a report."""
MAX_INTEGER = 2**63
KINDS: dict[str | None, type[Report]] = {
    None: SparsifyReport,
    "units": UnitsReport,
    "sweep": SweepReport,
}


def find_problem(report: object) -> str | None:
    """Return the first thing that is wrong with a report, or None."""
    if not isinstance(report, dict):
        return "not a report of prunekit: it is not a table"
    kind = report.get("kind")
    if not (kind is None or isinstance(kind, str)) or kind not in KINDS:
        return f"kind: is {_shown(kind)}; known are units and sweep"
    if problem := _find_unprintable(report, 0):
        return problem
    try:
        KINDS[kind].model_validate(report)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the report"
        return printable(f"{place}: {first['msg']}; found {_shown(first['input'])}")
    return None


def _find_unprintable(value: object, depth: int) -> str | None:
    """Return which value no page can show, or None."""
    if depth > MAX_DEPTH:
        return f"lists and tables are nested more than {MAX_DEPTH} deep"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return "holds an integer of more than 64 bits"
    if isinstance(value, str) and not _is_unicode(value):
        return f"holds a text that is not Unicode: {value!r}"
    if isinstance(value, dict):
        value = [*value, *value.values()]
    parts = value if isinstance(value, list) else ()
    return next(filter(None, (_find_unprintable(part, depth + 1) for part in parts)), None)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
