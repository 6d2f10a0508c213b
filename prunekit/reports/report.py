"""Writes, loads and renders reports: ``report.json`` and the views made from it.

``report.json`` holds all facts. ``report.html``, ``report.csv`` and, if the model was trained,
``training.csv`` can be made again from it at any time, without the run, the model or torch.
"""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunekit import formatting
from prunekit.checkpoint.atomic import write_atomically
from prunekit.errors import CheckpointError, ConfigError
from prunekit.models.units.kinds import WHOLE
from prunekit.reports import citation
from prunekit.reports.figures import heads, sweep, training, units
from prunekit.reports.figures import layers as layer_maps
from prunekit.reports.figures.picture import Picture, as_csv

FILES = JSON, CSV, HTML = "report.json", "report.csv", "report.html"
TRAINING = "training.csv"
"""Curves of the training, a row a recorded step."""
Show = Callable[[Any], str]
UNITS, SWEEP = "units", "sweep"
"""``kind`` of the report of a structured run, and of a sweep."""
LAYERS_SHOWN = 2000  # a mixture of experts has tens of thousands
PARTS = {
    "peak_rss_bytes": "peak, main memory",
    "peak_device_bytes": "peak, device memory",
    "block_bytes": "weights of a block",
    "statistics_bytes": "statistics",
    "hidden_bytes": "hidden states",
}


def write(report: dict[str, Any], folder: Path) -> None:
    """Write ``report.json``, the tables and ``report.html``, each atomically.

    JSON has neither infinity nor NaN: they are written as the strings "inf", "-inf" and "nan".
    """
    files = {JSON: formatting.json_text(report) + "\n", CSV: _table(report), HTML: render(report)}
    if report.get("training"):
        files[TRAINING] = as_csv(training.rows(report["training"]))
    for name, content in files.items():
        write_atomically(folder / name, formatting.unicode_text(content).encode())


def load(folder: Path) -> dict[str, Any]:
    """Read ``report.json`` of an output folder and check its structure.

    Raises:
        ConfigError: The folder or its ``report.json`` does not exist.
        CheckpointError: The file cannot be read, or is not a report of prunekit.
    """
    from prunekit.reports.schema.check import find_problem

    path = folder / JSON
    if not path.is_file():
        problem = f"no {JSON} here" if folder.is_dir() else "no such folder"
        raise ConfigError(
            f"{folder}: {problem}. Give the output folder of a finished `prunekit run`."
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}). Run `prunekit run` again.") from error
    if problem := find_problem(report):
        raise CheckpointError(
            f"{path}: {problem}. It is damaged or of another version: run `prunekit run` again."
        )
    return report


def render(report: dict[str, Any]) -> str:
    """Return the report as one HTML page without scripts or external resources."""
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
    page.globals |= {
        name: getattr(formatting, name) for name in ("change", "measured", "measured_change")
    }
    page.globals["citation"] = citation
    is_sweep = report.get("kind") == SWEEP
    variables = sweep.page(report) if is_sweep else _page(report)
    return page.get_template("sweep.html.j2" if is_sweep else "report.html.j2").render(
        report=report,
        config=json.dumps(report.get("config") or {}, indent=2, ensure_ascii=False),
        tables={
            title: _rows(report[key])
            for title, key in (("Environment", "environment"), ("Proof", "proof"))
            if report.get(key)
        },
        **variables,
    )


def _page(report: dict[str, Any]) -> dict[str, Any]:
    """Return the template variables of the page of one run."""
    return {
        "training": training.pictures(report["training"]) if report.get("training") else [],
        "maps": _figures(report),
        "layers": report["layers"][:LAYERS_SHOWN],
        "evaluation": [_with_bars(each) for each in report.get("evaluation") or []],
        "phases": _phases(report.get("seconds") or {}),
        "parts": _parts(report.get("memory") or {}),
    }


def _table(report: dict[str, Any]) -> str:
    """Return the table: a row per run, unit or layer."""
    if report.get("kind") == SWEEP:
        return sweep.table(report)
    if report.get("kind") == UNITS:
        return as_csv(units.rows(report["layers"]))
    columns = ("name", "sparsity", "relative_error", "seconds")
    return as_csv([{key: layer.get(key) for key in columns} for layer in report["layers"]])


def _or_missing(show: Show) -> Show:
    """Return a template filter that treats undefined values as None."""
    import jinja2

    return lambda value: show(None if isinstance(value, jinja2.Undefined) else value)


def _figures(report: dict[str, Any]) -> list[Picture]:
    """Return the figures of one run, whose SVG is escaped."""
    if not report["layers"]:
        return []
    return _unit_figures(report) if report.get("kind") == UNITS else _layer_figures(report)


def _unit_figures(report: dict[str, Any]) -> list[Picture]:
    layers = report["layers"]
    pictures = [*units.maps(layers, report.get("agreement") or {}), *heads.head_figures(report)]
    if partial := [layer for layer in layers if layer["kind"] not in WHOLE]:
        rows = [{key: layer[key] for key in ("name", "sparsity")} for layer in partial]
        svg = layer_maps.sparsity_map(partial)
        pictures.insert(
            0, Picture("Fraction of units removed", svg, _sparsity_caption(partial), rows)
        )
    return pictures


def _layer_figures(report: dict[str, Any]) -> list[Picture]:
    layers = report["layers"]
    columns = ("name", "sparsity", "relative_error")
    rows = [{key: layer.get(key) for key in columns} for layer in layers]
    sparsity = Picture("Sparsity", layer_maps.sparsity_map(layers), _sparsity_caption(layers), rows)
    trained = report.get("training")
    if trained and trained["post"] is None:  # pruned while it was trained: there is no one error
        return [sparsity]
    error = "Relative squared error of the output"
    if "sampled_gram" in ((report.get("calibration") or {}).get("gathers") or ()):
        error += ", estimated from one sample in four"
    caption = _error_caption(layers) + " Before the training." * bool(trained)
    return [sparsity, Picture(error, layer_maps.error_map(layers), caption, rows)]


def _sparsity_caption(layers: list[dict[str, Any]]) -> str:
    """Return the range of sparsity over the layers."""
    low, high = (
        formatting.percent(end(entry["sparsity"] for entry in layers)) for end in (min, max)
    )
    return f"{low} in every layer." if low == high else f"From {low} to {high}."


def _error_caption(layers: list[dict[str, Any]]) -> str:
    """Return the median and the highest relative error."""
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


def _with_bars(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Add the lengths of two bars, as percentages of the longer one."""
    values = [
        float("nan" if evaluation.get(key) is None else evaluation[key])
        for key in ("before", "after")
    ]
    top = max((value for value in values if not math.isnan(value)), default=0)
    shares = [_share(value, top) for value in values]
    return {**evaluation, "bars": list(zip(("before", "after"), shares, strict=True))}


def _share(value: float, whole: float) -> float:
    """Return 100 · value / whole; infinity is 100 of anything."""
    if math.isinf(value):
        return 100.0
    return round(100 * value / whole, 2) if whole > 0 and not math.isnan(value) else 0.0


def _phases(seconds: dict[str, float]) -> list[tuple[str, float, float]]:
    """Return name, seconds and percentage of each phase; the rest is "other"."""
    phases = {name: float(spent) for name, spent in seconds.items() if spent}
    total = phases.pop("total", 0.0) or sum(phases.values())
    rest = total - sum(phases.values())
    if phases and rest > 0.005 * total:
        phases["other"] = rest
    return [(name, spent, _share(spent, total)) for name, spent in phases.items()]


def _parts(memory: dict[str, int]) -> list[tuple[str, int, float]]:
    """Return name, bytes and relative size of each use of memory."""
    top = max(filter(None, memory.values()), default=0)
    return [
        (PARTS.get(key, key.removesuffix("_bytes").replace("_", " ")), used, _share(used, top))
        for key, used in memory.items()
        if used
    ]


def _rows(table: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested facts to pairs of name "outer, inner" and value."""
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
