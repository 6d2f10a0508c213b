"""Finished runs side by side, as one table for a paper.

Runs that differ in nothing but their seed are one row: mean ± sample standard deviation.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunekit import formatting
from prunekit.errors import ConfigError
from prunekit.reports import citation

SEEDS = frozenset({"seed", "random_seed"})
"""Keys in which runs of one row differ."""
NOT_OF_THE_METHOD = frozenset({"method", "pattern", "sparsity", "parameters", *SEEDS})
DENSE = "dense"


@dataclass(frozen=True)
class Column:
    """A measure; only figures of the same protocol can be compared.

    Attributes:
        metric: Such as ``perplexity``.
        data: The text or data set.
        protocol: How it was measured.
    """

    metric: str
    data: str
    protocol: str

    @property
    def title(self) -> str:
        """Heading of the column."""
        return f"{self.metric}, {self.data}"


@dataclass(frozen=True)
class One:
    """One model: a run, or the dense model.

    Attributes:
        model: Name of the model.
        settings: Keys of ``[prune]`` and ``[calibration]`` that decide it, but seeds; empty for
            the dense model.
        achieved: Removed fraction.
        values: Its measures.
    """

    model: str
    settings: Mapping[str, Any]
    achieved: float
    values: Mapping[Column, float]

    @property
    def key(self) -> tuple[str, str]:
        """What runs of one row share."""
        return self.model, repr(sorted(self.settings.items()))


@dataclass
class Row:
    """Models that differ in nothing but their seed.

    Attributes:
        model: Name of the model.
        method: The method, with the settings that differ between rows.
        pattern: The pattern.
        achieved: Removed fraction of each.
        values: Measures of each.
    """

    model: str
    method: str
    pattern: str
    achieved: list[float] = field(default_factory=list)
    values: dict[Column, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A table of runs.

    Attributes:
        columns: Its measures.
        rows: Its rows, the dense models first.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]

    def cells(self) -> list[list[str]]:
        """Return the table as text, its heading first."""
        models = len({row.model for row in self.rows}) > 1
        heading = ["Method", "Pattern", "Sparsity", "Runs", *(each.title for each in self.columns)]
        found = [["Model"] * models + heading]
        for row in self.rows:
            first = [row.model] * models + [row.method, row.pattern]
            runs = str(len(row.achieved)) if row.method != DENSE else formatting.MISSING
            share = formatting.percent(statistics.fmean(row.achieved))
            cells = [_value(each, row.values.get(each, [])) for each in self.columns]
            found.append([*first, share, runs, *cells])
        return found

    def markdown(self) -> str:
        """Return the table in Markdown, with a footnote for each protocol."""
        lines = [[cell.translate(citation.MARKDOWN) for cell in row] for row in self.cells()]
        rule = ["---"] * len(lines[0])
        table = "\n".join(f"| {' | '.join(row)} |" for row in [lines[0], rule, *lines[1:]])
        notes = "\n".join(f"- {note}" for note in self._notes())
        return f"{table}\n\n{notes}" if notes else table

    def latex(self) -> str:
        r"""Return the table as a LaTeX ``tabular`` of the package booktabs."""
        lines = [[cell.translate(citation.LATEX) for cell in row] for row in self.cells()]
        left = len(lines[0]) - len(self.columns)
        body = [" & ".join(cell.replace("±", r"$\pm$") for cell in row) + r" \\" for row in lines]
        return "\n".join(
            [
                *(f"% {note}" for note in self._notes()),
                rf"\begin{{tabular}}{{{'l' * left}{'r' * len(self.columns)}}}",
                r"\toprule",
                body[0],
                r"\midrule",
                *body[1:],
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the table for programs: every value of every row."""
        rows = [
            {
                "model": row.model,
                "method": row.method,
                "pattern": row.pattern,
                "achieved": row.achieved,
                "measures": [
                    {"metric": each.metric, "data": each.data, "values": row.values[each]}
                    | spread(row.values[each])
                    for each in self.columns
                    if each in row.values
                ],
            }
            for row in self.rows
        ]
        protocols = [{"title": each.title, "protocol": each.protocol} for each in self.columns]
        return {"columns": protocols, "rows": rows}

    def _notes(self) -> Iterator[str]:
        for column in self.columns:
            protocol = " ".join(column.protocol.split()).rstrip(".")
            yield f"{column.title}: {protocol}."


def compare(reports: Iterable[Mapping[str, Any]]) -> Comparison:
    """Compare finished runs and sweeps.

    Args:
        reports: Their reports.

    Raises:
        ConfigError: None of them measured anything.
    """
    models = [one for report in reports for one in _models(report)]
    columns = list(dict.fromkeys(column for one in models for column in one.values))
    if not columns:
        raise ConfigError("compare: none of these runs has an [evaluate] that measured anything.")
    shown = _differing(models)
    rows: dict[tuple[str, str], Row] = {}
    for one in sorted(models, key=lambda each: bool(each.settings)):
        pattern = str(one.settings.get("pattern", formatting.MISSING))
        row = rows.setdefault(one.key, Row(one.model, _method(one, shown), pattern))
        row.achieved.append(one.achieved)
        for column, value in one.values.items():
            row.values.setdefault(column, []).append(value)
    for row in rows.values():
        if row.method == DENSE:  # it was measured beside each run
            row.achieved = row.achieved[:1]
            row.values = {column: values[:1] for column, values in row.values.items()}
    return Comparison(columns, [*rows.values()])


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and sample standard deviation; the latter None for one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation}


def _models(report: Mapping[str, Any]) -> Iterator[One]:
    """Yield the models of a report, the dense one first."""
    name = citation.model_name(dict(report))
    config = report.get("config") or {}
    if report.get("kind") == "sweep":
        yield One(name, {}, 0.0, _measures(report["dense"]["evaluation"], "value"))
        for run in report["runs"]:
            calibration = run.get("calibration") or config.get("calibration") or {}
            settings = _settings(run["prune"], calibration)
            yield One(name, settings, run["achieved"], _measures(run["evaluation"], "value"))
        return
    evaluation = report.get("evaluation") or []
    prune = config.get("prune") or {"method": "apt", **(config.get("apt") or {})}
    if before := _measures(evaluation, "before"):
        yield One(name, {}, 0.0, before)
    settings = _settings(prune, config.get("calibration") or {})
    yield One(name, settings, report["sparsity"]["achieved"], _measures(evaluation, "after"))


def _settings(prune: Mapping[str, Any], calibration: Mapping[str, Any]) -> dict[str, Any]:
    text = {f"calibration {key}": calibration.get(key) for key in ("samples", "length")}
    pattern = prune.get("pattern")
    words = " and ".join(pattern) if isinstance(pattern, list) else pattern
    kept = {key: value for key, value in prune.items() if key not in SEEDS}
    return kept | text | {"pattern": words}


def _measures(evaluation: Iterable[Mapping[str, Any]], key: str) -> dict[Column, float]:
    return {
        Column(each["metric"], each["data"], each["protocol"]): float(each[key])
        for each in evaluation
        if each.get(key) is not None
    }


def _differing(models: Iterable[One]) -> dict[str, set[str]]:
    """Return, by method, the settings in which its rows differ."""
    values: dict[str, dict[str, set[str]]] = {}
    for one in models:
        for key, value in one.settings.items():
            if key not in NOT_OF_THE_METHOD:
                method = values.setdefault(str(one.settings["method"]), {})
                method.setdefault(key, set()).add(repr(value))
    return {
        method: {key for key, found in keys.items() if len(found) > 1}
        for method, keys in values.items()
    }


def _method(one: One, shown: Mapping[str, set[str]]) -> str:
    if not one.settings:
        return DENSE
    method = str(one.settings["method"])
    keys = [key for key in one.settings if key in shown.get(method, ())]
    return ", ".join([method, *(f"{key} {one.settings[key]}" for key in keys)])


def _value(column: Column, values: Sequence[float]) -> str:
    if not values:
        return formatting.MISSING
    found = spread(values)
    mean = formatting.measured(column.metric, found["mean"])
    if found["deviation"] is None:
        return mean
    return f"{mean} ± {formatting.measured(column.metric, found['deviation'])}"
