"""Tables and curves of :mod:`bench.training.apt`."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
HEADS = (
    "contestant",
    "quality",
    "of dense",
    "kept of the blocks",
    "s",
    "s to 97 %",
    "peak GB",
    "forward, of dense",
)


def page(results: dict[str, Any]) -> str:
    """Return everything measured as Markdown."""
    text = [
        "APT, its ablations, and what people do instead, at equal numbers of steps. Mean ±",
        "deviation of the seeds (their number in brackets), the best mean of smaller models in",
        "bold; seconds of the training (to 97 %: until the pruned model first had so much of the",
        "dense quality), peak memory of the process, and the time of a forward of 32 samples over",
        "the dense model's; — where other work ran beside. Made by `python -m bench.training.apt`.",
    ]
    for task, dense in results["dense"].items():
        rows = [row for row in results["rows"] if row["task"] == task]
        for steps in sorted({row["steps"] for row in rows}):
            text += ["", f"## {task}, {steps} steps", ""]
            text += [
                f"Dense {dense['metric']} {dense['quality']:.4f}; {dense['parameters']:.0%} of the "
                "blocks' parameters are kept.",
                "",
                f"| {' | '.join(HEADS)} |",
                "|---" * len(HEADS) + "|",
            ]
            text += _table([row for row in rows if row["steps"] == steps], dense)
    text += _speed(results.get("speed", [])) + _memory(results.get("memory", []))
    return "\n".join(text) + "\n"


def _speed(rows: Sequence[Row]) -> list[str]:
    """Return the table of time and bytes of the smaller models."""
    if not rows:
        return []
    widths = {"global": "by salience", "layer": "equal in all layers"}
    text = [
        "",
        "## The smaller models",
        "",
        "Time and bytes of all weights over the dense model's, with 40 % of the parameters of the",
        "blocks: a forward of 32 samples, and greedy decoding of one. Made by",
        "`python -m bench.training.apt_speed`.",
        "",
        "| model | widths | forward | a decoded token | bytes |",
        "|---|---|---|---|---|",
    ]
    dense = {row["task"]: row for row in rows if row["scope"] is None}
    for row in rows:
        if row["scope"] is not None:
            whole = dense[row["task"]]
            ratios = [
                f"{row[key] / whole[key]:.2f}" if row[key] else ""
                for key in ("forward_ms", "decode_ms", "bytes")
            ]
            text.append(f"| {row['task']} | {widths[row['scope']]} | {' | '.join(ratios)} |")
    return text


def _memory(rows: Sequence[Row]) -> list[str]:
    """Return the table of the memory of trainings."""
    if not rows:
        return []
    whole = rows[-1]["peak_bytes"]
    return [
        "",
        "## Memory of the training",
        "",
        f"Peak of the process that trains {rows[0]['model']} in float32, 16 steps of 4 samples of",
        "128 tokens. Made by `python -m bench.training.apt_speed --memory FOLDER`.",
        "",
        "| training | peak GB | of training all weights |",
        "|---|---|---|",
        *(
            f"| {row['training']} | {peak / 1e9:.2f} | {peak / whole:.2f} |"
            for row in rows
            for peak in [row["peak_bytes"]]
        ),
    ]


def _table(rows: Sequence[Row], dense: Row) -> list[str]:
    names = [*dict.fromkeys(row["contestant"] for row in rows)]
    of = {name: [row for row in rows if row["contestant"] == name] for name in names}
    means = {name: statistics.mean(row["quality"] for row in each) for name, each in of.items()}
    smaller = [name for name in names if of[name][0]["kept"] < 1]
    lower = dense["metric"] == "perplexity"
    best = (min if lower else max)(smaller, key=means.__getitem__, default=None)
    return [_line(name, each, dense, is_best=name == best) for name, each in of.items()]


def _line(name: str, rows: Sequence[Row], dense: Row, *, is_best: bool) -> str:
    quality = _spread([row["quality"] for row in rows], 4)
    timed = [row for row in rows if not row.get("busy")]
    reached = [each for row in timed if (each := time_to_goal(row, dense)) is not None]
    cells = [
        name,
        f"**{quality}**" if is_best else quality,
        f"{statistics.mean(row['quality'] for row in rows) / dense['quality']:.3f}",
        f"{rows[0]['kept']:.3f}",
        _mean([row["seconds"] for row in timed], ".0f"),
        _mean(reached, ".0f") if len(reached) == len(timed) else "not reached",
        f"{statistics.mean(row['peak_bytes'] for row in rows) / 1e9:.2f}",
        _mean([row["forward_ms"] / dense["forward_ms"] for row in timed], ".2f"),
    ]
    return f"| {' | '.join(cells)} |"


def time_to_goal(row: Row, dense: Row) -> float | None:
    """Return the seconds until the pruned model was good enough, or None."""
    share, lower = dense["goal"], dense["metric"] == "perplexity"
    for point in row["curve"]:
        ratio = (
            dense["quality"] / point["quality"] if lower else point["quality"] / dense["quality"]
        )
        if point["done"] and ratio >= share:
            return point["seconds"]
    return None


def _mean(values: Sequence[float], form: str) -> str:
    return format(statistics.mean(values), form) if values else "—"


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f} [{len(values)}]"


def curves(results: dict[str, Any], path: Path) -> None:
    """Draw the curves of each task with matplotlib, if it is installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [task for task in results["dense"] if any(r["task"] == task for r in results["rows"])]
    if not names:
        return
    kinds = {"quality": "quality", "held_out": "held-out loss", "achieved": "removed"}
    kinds["ranks"] = "mean rank"
    figure, axes = plt.subplots(
        len(names), len(kinds), figsize=(4 * len(kinds), 3 * len(names)), squeeze=False
    )
    for line, task in zip(axes, names, strict=True):
        rows = [row for row in results["rows"] if row["task"] == task and not row["seed"]]
        for axis, (key, title) in zip(line, kinds.items(), strict=True):
            for number, row in enumerate(rows):
                points = [(each["step"], each[key]) for each in row["curve"]]
                shown = [(step, value) for step, value in points if value is not None]
                if shown:
                    label = f"{row['contestant']}, {row['steps']} steps"
                    color = f"C{number}"  # the same in each of the figures
                    axis.plot(*zip(*shown, strict=True), label=label, color=color, linewidth=1)
            axis.set_title(f"{task}: {title}", fontsize=9)
        line[0].legend(fontsize=5)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
