"""APT compared with its ablations and with what people do instead, at equal steps.

    python -m bench.training.apt [--task NAME …] [--only NAME …] [--steps N] [--seeds N]
        [--minutes N] [--busy]

Quality of the smaller model, time until 97 % of the dense quality, peak memory of the process, and
the speed of the result beside the dense model. Every row is a process of its own; rows already in
``bench/results/training/apt.json`` are not measured again, so it can be run in pieces, and with
``--busy`` beside other work: the page then shows no times of these rows.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from bench.harness.measure import RESULTS, describe, write_json
from bench.training.apt_contestants import CONTESTANTS, Ask
from bench.training.apt_page import curves, page
from bench.training.apt_tasks import AptTask, tasks
from prunekit.structured.parameter_budget import counted_parameters

FOLDER = RESULTS / "training"
FILE = FOLDER / "apt.json"
KEY = ("task", "contestant", "steps", "seed")
GOAL = 0.97
"""Share of the dense quality to which the time is measured."""

Row = dict[str, Any]


def measure(row: Row) -> Row:
    """Return a row with what was measured, in this process."""
    task = tasks()[row["task"]]
    ask, model = Ask(task, row["steps"], row["seed"]), task.load()
    whole = _blocks(model)
    seconds, curve, began = 0.0, [], time.perf_counter()
    for step in CONTESTANTS[row["contestant"]](model, ask):
        if step.held_out is None:
            continue
        seconds += time.perf_counter() - began
        curve.append(
            {
                "step": step.step,
                "seconds": seconds,
                "loss": step.loss,
                "held_out": step.held_out,
                "quality": task.quality(model),
                "achieved": step.achieved,
                "done": step.done,
                "ranks": step.details.get("ranks", {}).get("mean"),
            }
        )
        print(json.dumps(curve[-1]), file=sys.stderr, flush=True)
        began = time.perf_counter()
    return row | {
        "quality": task.quality(model),
        "seconds": seconds + time.perf_counter() - began,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "kept": _blocks(model) / whole,
        "forward_ms": forward_milliseconds(model, task),
        "curve": curve,
    }


def _blocks(model: Any) -> int:  # noqa: ANN401  a transformers model
    return sum(each.numel() for each in counted_parameters(model, "blocks"))


@torch.inference_mode()
def forward_milliseconds(model: Any, task: AptTask, runs: int = 15) -> float:  # noqa: ANN401
    """Return the median time of the forward of a batch."""
    batch = task.train(32, 0)[0]
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        model(**batch)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def dense(task: AptTask) -> Row:
    """Return the quality and the speed of the dense model."""
    model = task.load()
    return {
        "quality": task.quality(model),
        "metric": task.metric,
        "parameters": task.parameters,
        "goal": GOAL,
        "forward_ms": forward_milliseconds(model, task),
    }


def save(results: dict[str, Any]) -> None:
    """Rewrite the JSON, the page and the curves."""
    write_json(FILE, results)
    FILE.with_suffix(".md").write_text(page(results))
    curves(results, FILE.with_suffix(".png"))


def main() -> None:
    """Measure missing rows and rewrite the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", nargs="*", default=["sst2"])
    parser.add_argument("--only", nargs="*", default=[], choices=[*CONTESTANTS])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after these")
    parser.add_argument("--row", help="measure one row in this process, and print it")
    parser.add_argument("--busy", action="store_true", help="other work runs: show no times")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(json.loads(options.row))))
        return
    results: dict[str, Any] = {"machine": describe(torch.device("cpu")), "dense": {}, "rows": []}
    if FILE.is_file():
        results |= json.loads(FILE.read_text())
    found, began = tasks(), time.monotonic()
    measured = {tuple(row[name] for name in KEY) for row in results["rows"]}
    for seed in range(options.seeds):
        for name in options.task:
            if name not in found:
                continue
            results["dense"].setdefault(name, None)
            results["dense"][name] = results["dense"][name] or dense(found[name])
            for contestant in options.only or CONTESTANTS:
                key = (name, contestant, options.steps, seed)
                if key in measured or time.monotonic() - began > 60 * options.minutes:
                    continue
                row = _in_process(dict(zip(KEY, key, strict=True)))
                results["rows"].append(row | ({"busy": True} if options.busy else {}))
                save(results)


def _in_process(row: Row) -> Row:
    """Measure a row in a process of its own, so that its peak memory is known."""
    command = [sys.executable, "-m", "bench.training.apt", "--row", json.dumps(row)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
