"""Figures of a sweep: each measure over the removed fraction."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from prunekit import formatting
from prunekit.reports.compare import compare, spread
from prunekit.reports.figures.lines import Axis, Curve, curves
from prunekit.reports.figures.matrix import Matrix, picture
from prunekit.reports.figures.picture import Picture, as_csv

if TYPE_CHECKING:
    from prunekit.formatting import Number

Value = Callable[[dict[str, Any]], "float | None"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8b5cf6")
"""Colors of the lines, reused after the last; Okabe and Ito, safe for color blindness."""


@dataclass(frozen=True)
class Measure:
    """A number of each run, and how a figure shows it."""

    title: str
    label: str
    value: Value
    write: Callable[["Number"], str]
    caption: str
    wide: bool = False
    """Whether the axis is logarithmic where values span more than a power of ten."""


def page(report: dict[str, Any]) -> dict[str, Any]:
    """Return the template variables of the page of a sweep."""
    names = list(dict.fromkeys(run["series"] for run in report["runs"]))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    measures = _measures(report)
    return {
        "legend": list(colours.items()),
        "measures": measures,
        "pictures": [
            *(_picture(report, measure, colours) for measure in measures),
            *map(_agreement, report.get("agreement", ())),
        ],
        "best": _best(report),
        "comparison": compare([report]) if all("prune" in run for run in report["runs"]) else None,
    }


def table(report: dict[str, Any]) -> str:
    """Return all measures of all runs as CSV, the dense model first."""
    measures = _measures(report)
    rows = [
        {
            "run": run.get("name", "dense"),
            "series": run.get("series", "dense"),
            "sparsity": run.get("sparsity", 0.0),
            "achieved": run.get("achieved", 0.0),
            **{measure.title: measure.value(run) for measure in measures},
        }
        for run in (report["dense"], *report["runs"])
    ]
    return as_csv(rows)


def _measures(report: dict[str, Any]) -> list[Measure]:
    """Return the measures that a report has, in page order."""
    measures = [
        Measure(
            f"{evaluation['metric'].capitalize()} on {evaluation['data']}",
            evaluation["metric"],
            lambda run, place=place: float(run["evaluation"][place]["value"]),
            partial(formatting.measured, evaluation["metric"]),
            "Higher is better." if _higher_is_better(evaluation) else "Lower is better.",
            wide=True,
        )
        for place, evaluation in enumerate(report["dense"]["evaluation"])
    ]
    if "decode" in report["dense"]:
        measures += [
            Measure("Tokens/s written", "tokens/s", _of("decode"), formatting.number,
                    "After the first new token, one prompt at a time; median of the prompts. "
                    "Zeros in dense files make nothing faster."),
            Measure("Tokens/s read", "tokens/s", _of("prefill"), formatting.number,
                    "Prefill of a prompt in one forward; median of the prompts."),
        ]  # fmt: skip
    measures += [
        Measure("Peak memory", "bytes", _peak, formatting.size,
                "Of a process that evaluates the model and generates text: on the device, or "
                "else in main memory."),
        Measure("Files", "bytes", _of("bytes"), formatting.size, "Weights on disk."),
    ]  # fmt: skip
    kinds = dict.fromkeys(kind for run in report["runs"] for kind in run["active"])
    measures += [
        Measure(
            f"Active {kind}", kind, _active(kind, report), formatting.count, "Number of kept units."
        )
        for kind in kinds
    ]
    if kinds:
        measures.append(
            Measure("Parameters", "parameters", _parameters(report), formatting.count,
                    "Tied ones count once."))  # fmt: skip
    if "decode" in report["dense"]:
        measures += [
            Measure("Lexical diversity", "different words / words", _of("lexical_diversity"),
                    formatting.number, "Of greedily generated text; median of the prompts."),
            Measure("Repetition", "repeated words", _of("repetition"), formatting.number,
                    "Fraction of words that are repeated among the next 50; median."),
        ]  # fmt: skip
    return measures


def _higher_is_better(evaluation: dict[str, Any]) -> bool:
    known = evaluation.get("higher_is_better")  # of tasks of lm-eval
    return evaluation["metric"] in formatting.FRACTIONS if known is None else known


def _of(key: str) -> Value:
    return lambda run: run[key]


def _peak(run: dict[str, Any]) -> float:
    return run["peak_device_bytes"] or run["peak_rss_bytes"]


def _parameters(report: dict[str, Any]) -> Value:
    return lambda run: run.get("parameters", report["model"]["parameters"])


def _active(kind: str, report: dict[str, Any]) -> Value:
    whole = next(run["whole"][kind] for run in report["runs"] if kind in run["whole"])
    return lambda run: run.get("active", {}).get(kind, whole)


def _picture(report: dict[str, Any], measure: Measure, colours: dict[str, str]) -> Picture:
    dense = measure.value(report["dense"])
    rows = [{"series": "dense", "sparsity": 0.0, measure.title: dense}]
    lines = []
    for name, colour in colours.items():
        levels: dict[float, list[float]] = {}
        for run in sorted(report["runs"], key=lambda run: run["sparsity"]):
            value = measure.value(run)
            if run["series"] == name:
                rows.append({"series": name, "sparsity": run["sparsity"], measure.title: value})
                if value is not None:
                    levels.setdefault(run["sparsity"], []).append(value)
        found = [(level, spread(values)) for level, values in levels.items()]
        points = [(level, each["mean"]) for level, each in found]
        deviations = [each["deviation"] for _, each in found]
        tips = [_tip(name, level, each, measure) for level, each in found]
        lines.append(Curve(colour, points, tips, spread=deviations))
    over = Axis(measure.label, measure.write, wide=measure.wide, salt=measure.title)
    svg = curves(lines, dense, over)
    caption = f"{measure.caption} Dashed: the dense model, {measure.write(dense)}."
    return Picture(measure.title, svg, caption, rows, "Lines over the removed fraction")


def _tip(name: str, level: float, found: dict[str, "float | None"], measure: Measure) -> str:
    deviation = found["deviation"]
    more = "" if deviation is None else f" ± {measure.write(deviation)}"
    return f"{name}, {formatting.percent(level)}: {measure.write(found['mean'])}{more}"


def _agreement(agreement: dict[str, Any]) -> Picture:
    names = agreement["rankers"]
    return picture(
        f"How far rankers of {agreement['kind']} agree",
        Matrix(
            "Spearman's ρ",
            agreement["spearman"],
            ("ranker", "other"),
            names,
            names,
            "ranker",
            bounds=(-1.0, 1.0),
            named=True,
        ),
        "1: both rank all units alike; 0: the rankings are unrelated; −1: one reverses the other. "
        "Scores of the dense model; leave-one-out is the true loss without one unit.",
        agreement["kind"],
    )


def _best(report: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """Return the run with the best first metric, for each sparsity."""
    levels: dict[float, dict[str, Any]] = {}

    def quality(run: dict[str, Any]) -> float:
        first = run["evaluation"][0]
        higher_is_better = _higher_is_better(first)
        return -float(first["value"]) if higher_is_better else float(first["value"])

    for run in report["runs"]:
        known = levels.get(run["sparsity"])
        if known is None or quality(run) < quality(known):
            levels[run["sparsity"]] = run
    return sorted(levels.items())
