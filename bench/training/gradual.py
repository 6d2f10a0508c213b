"""Sparse training compared: schedules, one shot, masks of better methods.

    python -m bench.training.gradual [--steps N …] [--sparsity S …] [--seeds N] [--only NAME …]
        [--minutes N] [--busy]
    python -m bench.training.gradual --cost | --traps

Perplexity of held-out stories after so many AdamW steps of 8 × 128 tokens, with the schedule over
the first half of them. Rows already in ``bench/results/training/gradual.json`` are not measured
again, so it can be run in pieces, and the machine need not be idle. ``--cost`` measures time and
memory of a step (on an idle machine), ``--traps`` tries known mistakes, also on the libraries of
others that :mod:`bench.training.others` says how to install. The full comparison:

    python -m bench.training.gradual --steps 2000 --sparsity 0.7 0.8 0.9 --seeds 3
"""

import argparse
import json
import math
import time
from typing import Any

import torch

from bench.harness.measure import RESULTS, describe, write_json
from bench.training import others, unit_traps
from bench.training.contestants import CONTESTANTS
from bench.training.cost import cost
from bench.training.page import page, plot
from bench.training.task import RATE, Ask, Task, task, train
from bench.training.traps import tried

FOLDER = RESULTS / "training"
FILE = FOLDER / "gradual.json"
SAMPLES = 64
"""Calibration samples of methods with statistics."""
KEY = ("contestant", "steps", "sparsity", "seed", "rate")

Row = dict[str, Any]


def wanted(options: argparse.Namespace) -> list[Row]:
    """Return the keys of the rows that are asked for, in order."""
    return [
        dict(zip(KEY, (name, steps, sparsity, seed, RATE), strict=True))
        for seed in range(options.seeds)
        for steps in options.steps
        for sparsity in options.sparsity
        for name in options.only or CONTESTANTS
    ]


def measure(found: Task, row: Row) -> Row:
    """Return a row with what was measured."""
    tokens = found.samples(SAMPLES, seed=row["seed"])
    ask = Ask(row["sparsity"], end=row["steps"] // 2, tokens=tokens)
    attach = CONTESTANTS[row["contestant"]]
    return row | train(found, attach, ask, steps=row["steps"], seed=row["seed"])


def key(row: Row) -> tuple[Any, ...]:
    """Return the key of a row."""
    return tuple(row[name] for name in KEY)


def save(results: dict[str, Any]) -> None:
    """Rewrite the JSON, the page and the curves."""
    write_json(FILE, results)
    FILE.with_suffix(".md").write_text(page(results))


def main() -> None:
    """Measure missing rows and rewrite the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="*", default=[200])
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.8, 0.9])
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0")
    parser.add_argument("--only", nargs="*", default=[], choices=[*CONTESTANTS])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after these")
    parser.add_argument("--busy", action="store_true", help="other work runs: show no seconds")
    parser.add_argument("--cost", action="store_true", help="time and memory of a step")
    parser.add_argument("--traps", action="store_true", help="known mistakes")
    run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    """Measure as asked until time runs out."""
    began, found = time.monotonic(), task()
    if found is None:
        return
    results: dict[str, Any] = {"rows": [], "cost": [], "traps": [], "libraries": {}}
    if FILE.is_file():
        results |= json.loads(FILE.read_text())
    results |= {"model": found.name, "machine": describe(torch.device("cpu"))}
    results.setdefault("dense", found.perplexity(found.load()))
    if options.cost:
        results["cost"] = cost(found, options.sparsity[0], options.steps[0])
    if options.traps:
        results["traps"] = [*tried(found), *unit_traps.tried()]
        results["libraries"] = others.versions()
    rows = {key(row): row for row in results["rows"]}
    for row in [] if options.cost or options.traps else wanted(options):
        if key(row) in rows:
            continue
        rows[key(row)] = measure(found, row) | ({"busy": True} if options.busy else {})
        results["rows"] = [*rows.values()]
        save(results)
        print(*key(row), rows[key(row)]["perplexity"], flush=True)
        if time.monotonic() - began > 60 * options.minutes:
            break
    save(results)
    plot(results, FOLDER / "gradual.png")


if __name__ == "__main__":
    main()
