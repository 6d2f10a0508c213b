"""Tables and picture of :mod:`bench.training.gradual`."""

import itertools
import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def page(results: dict[str, Any]) -> str:
    """Return everything measured as Markdown."""
    text = [
        f"{results['model']}, dense perplexity {results['dense']:.2f}, trained with AdamW on",
        "batches of 8 × 128 tokens; a schedule takes the first half of the steps. Perplexity of",
        "held-out stories: mean ± deviation of the seeds (their number in brackets, if several),",
        "the lowest mean in bold; seconds of the whole training, if nothing else ran beside it. By",
        "magnitude unless the name says otherwise. Made by `python -m bench.training.gradual`.",
        "",
    ]
    text += _quality(results["rows"])
    if results["cost"]:
        text += [
            "",
            "Time over that of plain training, in turn in one process: of the whole training; then",
            "medians of spans of ten steps, with one pruning each while the schedule lasts. These",
            "vary by 4 % with where the models lie in memory; the time of its own code does not:",
            "it is over that of all other code of the same steps. Bits of masks per weight.",
            "",
        ]
        text += [
            _header(
                [
                    "contestant",
                    "ms a step",
                    "whole",
                    "while pruning",
                    "afterwards",
                    "own code",
                    "bits",
                ]
            )
        ]
        text += [
            f"| {row['contestant']} | {row['milliseconds']:.1f} | {row['whole']:.3f} "
            f"| {row['while_pruning']:.3f} "
            f"| {row['afterwards']:.3f} | {_own(row)} | {row['mask_bits']:.2f} |"
            for row in results["cost"]
        ]
    if results["traps"]:
        text += ["", _mistakes(results["libraries"])]
        for names, rows in itertools.groupby(results["traps"], tuple):  # by its columns
            text += ["", _header(["", *names[1:]])]
            text += [f"| {' | '.join(row.values())} |" for row in rows]
    return "\n".join(text) + "\n"


def _own(row: Row) -> str:
    """Return the relative time of the pruner's own code, if it was measured."""
    if "own_afterwards" not in row:
        return "—"
    during, afterwards = row["own_while_pruning"] - 1, row["own_afterwards"] - 1
    return f"{row['own'] - 1:.1%}: {during:.1%}, then {afterwards:.1%}"


def _mistakes(libraries: dict[str, str]) -> str:
    """Return what stands above the tables of traps."""
    versions = ", ".join(f"{name} {version}" for name, version in libraries.items())
    return (
        "Known mistakes, tried. First of zeroing weights of the model above, where Torch-Pruning\n"
        "has no column, as it zeroes none; then of removing neurons of stories260K, a Llama,\n"
        f"as it does not trace the Conv1D of GPT-2. {versions}."
    )


def _quality(rows: list[Row]) -> list[str]:
    """Return a table with a row for each contestant, a column for each setting."""
    settings = sorted({(row["steps"], row["sparsity"]) for row in rows})
    names = [*dict.fromkeys(row["contestant"] for row in rows)]
    cells = {
        (name, setting): [
            row
            for row in rows
            if (row["contestant"], row["steps"], row["sparsity"]) == (name, *setting)
        ]
        for name in names
        for setting in settings
    }
    best = {
        setting: min(_mean(cells[name, setting]) for name in names if cells[name, setting])
        for setting in settings
    }
    titles = [f"{steps} steps, {sparsity:.0%}" for steps, sparsity in settings]
    return [
        _header(["contestant", *titles]),
        *(
            f"| {name} | {' | '.join(_cell(cells[name, each], best[each]) for each in settings)} |"
            for name in names
        ),
    ]


def _mean(rows: list[Row]) -> float:
    return statistics.mean(row["perplexity"] for row in rows)


def _cell(rows: list[Row], best: float) -> str:
    if not rows:
        return "—"
    mean = _mean(rows)
    shown = f"**{mean:.2f}**" if mean == best else f"{mean:.2f}"
    if rows[1:]:
        spread = statistics.stdev(row["perplexity"] for row in rows)
        shown += f" ± {spread:.2f} ({len(rows)})"
    if any(row.get("busy") for row in rows):
        return shown
    return f"{shown}, {statistics.mean(row['seconds'] for row in rows):.0f} s"


def _header(names: list[str]) -> str:
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def plot(results: dict[str, Any], file: Path) -> None:
    """Draw the training loss and the counted sparsity over the steps, of the first seed."""
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["seed"] == 0]
    settings = sorted({(row["steps"], row["sparsity"]) for row in rows})
    if not settings:
        return
    figure = Figure(figsize=(4.5 * len(settings), 6), layout="constrained")
    panels = figure.subplots(2, len(settings), squeeze=False, sharex="col")
    for column, (steps, sparsity) in enumerate(settings):
        for row in rows:
            if (row["steps"], row["sparsity"]) == (steps, sparsity):
                at = [point["step"] for point in row["curve"]]
                for axes, name in zip(panels[:, column], ("loss", "sparsity"), strict=True):
                    values = [point[name] for point in row["curve"]]
                    axes.plot(at, values, label=row["contestant"])
                    axes.set_ylabel(name)
        panels[0, column].set_title(f"{steps} steps, {sparsity:.0%}")
        panels[1, column].set_xlabel("step")
    panels[0, -1].legend(fontsize="x-small")
    figure.savefig(file, dpi=90)
