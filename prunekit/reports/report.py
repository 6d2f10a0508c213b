"""The report of a run: ``report.json`` is the truth, ``report.html`` a view of it.

Nothing here needs the run, the model or torch: a page can be made again from its JSON at any time.
"""

import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunekit import formatting
from prunekit.errors import CheckpointError, ConfigError
from prunekit.models.units.kinds import WHOLE
from prunekit.reports import citation
from prunekit.reports.figures import heads, sweep
from prunekit.reports.figures import layers as figures
from prunekit.reports.figures import units as unit_figures
from prunekit.reports.figures.picture import Picture, as_csv

JSON, CSV, HTML = "report.json", "report.csv", "report.html"
Show = Callable[[Any], str]
UNITS, SWEEP = "units", "sweep"
"""``kind`` of a report about units that were taken out, and of one that compares runs."""
NEEDED = ("prunekit", "model", "sparsity", "layers")
NEEDED_OF_SWEEP = ("prunekit", "model", "dense", "runs")
LAYERS_SHOWN = 2000  # a mixture of experts has tens of thousands, which no reader scrolls through
PARTS = {
    "peak_rss_bytes": "peak, main memory",
    "peak_device_bytes": "peak, device memory",
    "block_bytes": "weights of a block",
    "statistics_bytes": "statistics",
    "hidden_bytes": "hidden states",
}


def write(report: dict[str, Any], folder: Path) -> None:
    """Write ``report.json``, ``report.csv`` and ``report.html``; each whole or not at all.

    JSON knows neither infinity nor NaN: they are written as the strings "inf", "-inf" and "nan".
    """
    text = json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False)
    _replace(folder / JSON, text + "\n")
    _replace(folder / CSV, _table(report))
    _replace(folder / HTML, render(report))


def load(folder: Path) -> dict[str, Any]:
    """Read ``report.json`` of an output folder.

    Raises:
        ConfigError: There is none.
        CheckpointError: It is not JSON, or not a report of prunekit.
    """
    path = folder / JSON
    if not path.is_file():
        what = f"no {JSON} here" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: {what}. Give the output folder of a finished `prunekit run`.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}). Run `prunekit run` again.") from error
    found = report if isinstance(report, dict) else {}
    needed = NEEDED_OF_SWEEP if found.get("kind") == SWEEP else NEEDED
    missing = [key for key in needed if key not in found]
    if missing:
        raise CheckpointError(f"{path}: not a report of prunekit, it lacks {', '.join(missing)}.")
    return found


def render(report: dict[str, Any]) -> str:
    """Return the report as one HTML page that needs no network and no script."""
    import jinja2

    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    page.filters |= {
        name: _or_missing(getattr(formatting, name))
        for name in ("number", "percent", "count", "size", "duration")
    }
    page.globals |= {"change": formatting.change, "citation": citation}
    compares = report.get("kind") == SWEEP
    shown = sweep.page(report) if compares else _page(report)
    return page.get_template("sweep.html.j2" if compares else "report.html.j2").render(
        report=report,
        config=json.dumps(report.get("config") or {}, indent=2, ensure_ascii=False),
        tables={
            title: _rows(report[key])
            for title, key in (("Environment", "environment"), ("Proof", "proof"))
            if report.get(key)
        },
        **shown,
    )


def _page(report: dict[str, Any]) -> dict[str, Any]:
    """Return what the page of one run shows besides."""
    return {
        "maps": _maps(report),
        "layers": report["layers"][:LAYERS_SHOWN],
        "evaluation": [_evaluated(found) for found in report.get("evaluation") or []],
        "phases": _phases(report.get("seconds") or {}),
        "parts": _parts(report.get("memory") or {}),
    }


def _table(report: dict[str, Any]) -> str:
    """Return what the pictures show as one table: a row for each run, unit or layer."""
    if report.get("kind") == SWEEP:
        return sweep.table(report)
    if report.get("kind") == UNITS:
        return as_csv(unit_figures.rows(report["layers"]))
    columns = ("name", "sparsity", "relative_error", "seconds")
    return as_csv([{key: layer.get(key) for key in columns} for layer in report["layers"]])


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _or_missing(show: Show) -> Show:
    """Let a filter take what the report does not have."""
    import jinja2

    return lambda value: show(None if isinstance(value, jinja2.Undefined) else value)


def _maps(report: dict[str, Any]) -> list[Picture]:
    """Return each heat map; its SVG is made by matplotlib and escaped by us."""
    layers = report["layers"]
    if not layers:
        return []
    columns = ("name", "sparsity", "relative_error")
    rows = [{key: layer.get(key) for key in columns} for layer in layers]
    if report.get("kind") == UNITS:
        found = [
            *unit_figures.maps(layers, report.get("agreement") or {}),
            *heads.views(report),
        ]
        if inside := [layer for layer in layers if layer["kind"] not in WHOLE]:
            shares = [{key: layer[key] for key in columns[:2]} for layer in inside]
            svg = figures.sparsity_map(inside)
            found.insert(0, Picture("Share of units that went", svg, _spread(inside), shares))
        if report.get("training"):
            found.insert(0, unit_figures.training(report["training"]))
        return found
    error = "Relative squared error of the output"
    if "sampled_gram" in (report.get("calibration") or {}).get("gathers", ()):
        error += ", told from one sample in four"
    return [
        Picture("Sparsity", figures.sparsity_map(layers), _spread(layers), rows),
        Picture(error, figures.error_map(layers), _worst(layers), rows),
    ]


def _spread(layers: list[dict[str, Any]]) -> str:
    low, high = (
        formatting.percent(end(entry["sparsity"] for entry in layers)) for end in (min, max)
    )
    return f"{low} in every layer." if low == high else f"From {low} to {high}."


def _worst(layers: list[dict[str, Any]]) -> str:
    known = {
        entry["name"]: float(entry["relative_error"])
        for entry in layers
        if entry.get("relative_error") is not None
    }
    if not known:
        return "Not measured: the method gathered no inputs to measure it on."
    worst = max(known, key=lambda name: (math.isnan(known[name]), known[name]))
    median = formatting.number(statistics.median(known.values()))
    grey = "" if len(known) == len(layers) else " Grey: not measured."
    return f"Median {median}; highest {formatting.number(known[worst])}, in {worst}.{grey}"


def _evaluated(found: dict[str, Any]) -> dict[str, Any]:
    """Add the lengths of the bars, as shares of the longer one."""
    values = [float("nan" if found.get(key) is None else found[key]) for key in ("before", "after")]
    top = max((value for value in values if not math.isnan(value)), default=0)
    shares = [_share(value, top) for value in values]
    return {**found, "bars": list(zip(("before", "after"), shares, strict=True))}


def _share(value: float, whole: float) -> float:
    """Return 100 · value / whole, where an infinite whole is only reached by infinity."""
    if math.isinf(value):
        return 100.0
    return round(100 * value / whole, 2) if whole > 0 and not math.isnan(value) else 0.0


def _phases(seconds: dict[str, float]) -> list[tuple[str, float, float]]:
    """Return name, seconds and share of each phase; what no phase accounts for is "other"."""
    total = seconds.get("total") or sum(filter(None, seconds.values()))
    phases = {name: spent for name, spent in seconds.items() if name != "total" and spent}
    rest = total - sum(phases.values())
    if phases and rest > 0.005 * total:
        phases["other"] = rest
    return [(name, spent, _share(spent, total)) for name, spent in phases.items()]


def _parts(memory: dict[str, int]) -> list[tuple[str, int, float]]:
    """Return name, bytes and share of the largest for each part of memory that was used."""
    top = max(filter(None, memory.values()), default=0)
    return [
        (PARTS.get(key, key.removesuffix("_bytes").replace("_", " ")), used, _share(used, top))
        for key, used in memory.items()
        if used
    ]


def _rows(table: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested facts to "outer, inner" and value."""
    rows = []
    for key, value in table.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            rows += _rows(value, f"{name}, ")
        elif isinstance(value, bool):
            rows.append((name, "yes" if value else "no"))
        else:
            rows.append((name, str(value)))
    return rows
