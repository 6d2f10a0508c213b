"""Size and speed of models that APT prunes, and the memory of its training.

    python -m bench.training.apt_speed [--memory FOLDER]

Each task's model is pruned once to 40 % of the parameters of its blocks, by the salience and the
joint budget of APT, and with equal widths in all layers. A forward of 32 samples, greedy decoding
of one sample, and the bytes of all weights are compared with the dense model's. With ``--memory``,
instead, the peak memory of training a causal model of FOLDER by APT is compared with that of
training adapters, and all of its weights: a process each, 16 steps of 4 samples of 128 tokens.
Results are added to those of :mod:`bench.training.apt`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.harness.measure import describe
from bench.training.apt import FILE, forward_milliseconds, save
from bench.training.apt_contestants import CONTESTANTS, Ask, prune_once
from bench.training.apt_tasks import AptTask, stories, tasks
from prunekit.structured.selection import UnitScope

KEPT = 0.4
"""Fraction of the blocks' parameters that is kept."""
SCOPES: tuple[UnitScope | None, ...] = (None, "global", "layer")
DECODED = 48
"""Tokens of a decoded sample."""
STEPS = 16
"""Steps of a training whose memory is measured: APT's ten windows need twelve."""
TRAININGS = ("APT", "adapters, not pruned", "all weights, not pruned")
Row = dict[str, Any]


@torch.inference_mode()
def decode_milliseconds(model: Any, task: AptTask, runs: int = 5) -> float | None:  # noqa: ANN401
    """Return the median time of a decoded token, or None for a model that decodes nothing."""
    if not model.can_generate():
        return None
    batch = {name: each[:1] for name, each in task.train(32, 0)[0].items() if name != "labels"}
    batch = {name: each[:, :16] for name, each in batch.items()}
    length = {"max_new_tokens": DECODED, "min_new_tokens": DECODED, "do_sample": False}
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        model.generate(**batch, **length)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times) / DECODED


def speed(task: AptTask, scope: UnitScope | None) -> Row:
    """Return time and bytes of a task's model, pruned within a scope, or dense."""
    model = task.load()
    if scope is not None:
        prune_once(model, Ask(replace(task, parameters=KEPT), 1, 0), scope=scope)
    weights = {each.data_ptr(): each.nbytes for each in model.parameters()}
    return {
        "task": task.name,
        "scope": scope,
        "bytes": sum(weights.values()),
        "forward_ms": forward_milliseconds(model, task),
        "decode_ms": decode_milliseconds(model, task),
    }


def train(name: str, folder: Path) -> Row:
    """Return the peak memory of this process, which trains a causal model for some steps."""
    whole = stories(folder, count=64, batch=4)
    task = replace(whole, held_out=lambda: whole.held_out()[:1])  # more take time, not memory
    for _ in CONTESTANTS[name](task.load(), Ask(task, STEPS, 0)):
        pass
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"model": folder.name, "training": name, "peak_bytes": peak}


def main() -> None:
    """Measure all rows and rewrite the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=Path, metavar="FOLDER")
    parser.add_argument("--train", help="carry out one training in this process")
    given = parser.parse_args()
    if given.train:
        print(json.dumps(train(given.train, given.memory)))
        return
    results: Row = json.loads(FILE.read_text())
    if given.memory:
        results["memory"] = [_in_process(name, given.memory) for name in TRAININGS]
    else:
        results["speed_machine"] = describe(torch.device("cpu"))
        results["speed"] = [speed(task, scope) for task in tasks().values() for scope in SCOPES]
    save(results)


def _in_process(name: str, folder: Path) -> Row:
    """Carry out one training in a process of its own, so that its peak memory is known."""
    command = [sys.executable, "-m", "bench.training.apt_speed", "--memory", folder]
    done = subprocess.run(
        [*command, "--train", name], stdin=subprocess.DEVNULL, check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
