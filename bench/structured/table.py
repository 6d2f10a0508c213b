"""Tables and picture of :mod:`bench.structured.methods`."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunekit.structured.agreement import spearman

LEVELS = (0.1, 0.3, 0.5, 0.7)
"""Fractions of all units that are pruned."""

DRAWN = (
    *("random", "entropy", "magnitude", "gradient"),
    *("obs + refit", "surgeon + refit", "hybrid + refit"),
)
"""Contestants of the picture: simple strategies, and the best of ours."""

Row = dict[str, Any]
Better = Callable[[float, float], bool]


@dataclass(frozen=True)
class Line:
    """Mean and deviation of a contestant at each level, and ρ."""

    name: str
    mean: list[float]
    deviation: list[float]
    rho: float | None


def lines(rows: list[Row]) -> list[Line]:
    """Return a line for each contestant of one model and kind."""
    truth = next((row["scores"] for row in rows if row["contestant"] == "leave-one-out"), None)
    found = []
    for name in dict.fromkeys(row["contestant"] for row in rows):
        seeds = [row for row in rows if row["contestant"] == name]
        known = [*zip(*(row["quality"] for row in seeds), strict=True)]
        rhos = [_rho(row["scores"], truth) for row in seeds if truth and "scores" in row]
        found.append(
            Line(
                name,
                [statistics.mean(values) for values in known],
                [statistics.stdev(values) if values[1:] else 0.0 for values in known],
                statistics.mean(rhos) if rhos else None,
            )
        )
    return found


def _rho(scores: list[float], truth: list[float]) -> float:
    return spearman(*({"all": torch.tensor(part)} for part in (scores, truth)))


def page(found: list[dict[str, Any]]) -> str:
    """Return everything measured as Markdown: the tables, and who beats random."""
    header = ["model", "units", "contestant", *(f"{level:.0%}" for level in LEVELS), "ρ"]
    text = [
        "Perplexity (less is better) or accuracy (more is) with so much of the heads or neurons",
        "gone; random: mean ± deviation of its seeds. ρ: Spearman's, to leave-one-out. The best of",
        "each column is bold. Made by `python -m bench.structured.methods`.",
        "",
        _header(header),
    ]
    wins: dict[str, list[int]] = {}
    for result in found:
        for kind in dict.fromkeys(row["kind"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["kind"] == kind]
            better = _better(rows[0]["metric"])
            every = lines(rows)
            text += _section(result["dense"], rows[0], every, better)
            _count_wins(every, better, wins)
    text += ["", "Where a contestant is better than random by more than random's deviation, of all"]
    text += ["models, kinds and levels at which both were measured:", ""]
    text += [_header(["contestant", "better", "of"])]
    ordered = sorted(wins.items(), key=lambda item: -item[1][0] / item[1][1])
    text += [f"| {name} | {won} | {of} |" for name, (won, of) in ordered]
    timed = [(result["model"], row) for result in found for row in result["speed"]]
    if timed:
        names = ["model", "half of heads and neurons", "parameters"]
        text += ["", _header([*names, "tokens/s read", "tokens/s written", "bytes"])]
        text += [_speed_line(*pair) for pair in timed]
    return "\n".join(text) + "\n"


def _better(metric: str) -> Better:
    return (lambda a, b: a < b) if metric == "perplexity" else (lambda a, b: a > b)


def _section(dense: float, first: Row, every: list[Line], better: Better) -> list[str]:
    units = f"{first['units']} {first['kind']}"
    text = [f"| {first['model']} | {units} | dense {first['metric']} | {_cell(dense)} | | | | |"]
    reached = first.get("levels", LEVELS)
    if reached != [*LEVELS]:
        levels = " | ".join(f"{level:.0%} gone" for level in reached)
        text.append(f"| {first['model']} | {units} | one stays in every layer | {levels} | |")
    best = [_best([line.mean[level] for line in every], better) for level in range(len(LEVELS))]
    for line in every:
        cells = [
            _cell(mean, deviation, bold=mean == top)
            for mean, deviation, top in zip(line.mean, line.deviation, best, strict=True)
        ]
        rho = "" if line.rho is None else f"{line.rho:.2f}"
        text.append(f"| {first['model']} | {units} | {line.name} | {' | '.join(cells)} | {rho} |")
    return text


def _best(values: list[float], better: Better) -> float:
    return next(a for a in values if not any(better(b, a) for b in values))


def _count_wins(every: list[Line], better: Better, wins: dict[str, list[int]]) -> None:
    chance = next((line for line in every if line.name == "random"), None)
    if chance is None:
        return
    for line in every:
        if line is chance:
            continue
        count = wins.setdefault(line.name, [0, 0])
        for mean, other, spread in zip(line.mean, chance.mean, chance.deviation, strict=True):
            reach = other - spread if better(0, 1) else other + spread
            count[0] += better(mean, reach)
            count[1] += 1


def _cell(value: float, deviation: float = 0.0, *, bold: bool = False) -> str:
    text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.1f}"
    text = f"**{text}**" if bold else text
    return text + (f" ± {deviation:.2g}" if deviation else "")


def _speed_line(model: str, row: Row) -> str:
    keys = ("parameters", "read", "write", "bytes")
    cells = [f"{row[key]:,.4g}" if key in row else "—" for key in keys]
    return f"| {' | '.join([model, row['variant'], *cells])} |"


def _header(names: list[str]) -> str:
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def plot(every: list[dict[str, Any]], file: Path) -> None:
    """Draw quality over pruned heads, one panel per model.

    Random is drawn with its deviation.
    """
    from matplotlib.figure import Figure

    models = [model for model in every if any(row["kind"] == "heads" for row in model["rows"])]
    columns = 4
    figure = Figure(figsize=(4 * columns, 3.4 * -(-len(models) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(models) // columns), columns, squeeze=False).flatten()
    for axes, model in zip(panels, models, strict=False):
        heads = [row for row in model["rows"] if row["kind"] == "heads"]
        for name in DRAWN:
            runs = [row for row in heads if row["contestant"] == name]
            if runs:
                found = [*zip(*(row["quality"] for row in runs), strict=True)]
                spread = [statistics.stdev(part) if part[1:] else 0.0 for part in found]
                levels = [100 * level for level in runs[0].get("levels", LEVELS)]
                means = [statistics.mean(part) for part in found]
                axes.errorbar(levels, means, spread, label=name, marker="o")
        metric = heads[0]["metric"]
        axes.set(title=model["model"], xlabel="heads gone, %", ylabel=metric)
        axes.set_yscale("log" if metric == "perplexity" else "linear")
    for axes in panels[len(models) :]:
        axes.set_axis_off()
    handles, names = panels[0].get_legend_handles_labels()
    panels[-1].legend(handles, names, loc="center")
    figure.savefig(file, dpi=90)
