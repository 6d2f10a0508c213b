"""Time whole jobs on two ranks beside one process of two threads.

    python -m bench.jobs.ranks [--models MODEL …] [--methods METHOD …] [--repeats N]

MODEL is stories15M (from ../shared), or llama-1k, a Llama of random parameters, made first. Each
rank's traffic is compared with the plan, and the matrix products of its solve, counted by torch's
profiler, with those of one process. The time that torchrun takes for two processes that do nothing
is measured as well. New rows replace old ones. Run it on an idle machine only.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.harness.measure import RESULTS, describe
from bench.jobs.end_to_end import CACHE, SHARED, timed
from bench.jobs.memory import VOCABULARY, Shape, make
from prunekit.config.load import load_config
from prunekit.distributed.ranks import Ranks
from prunekit.runs.sparsify.planner import plan

LLAMA = Shape(1024, 2816, 2, 16, 16, (), (16, 256))
MODELS = ("stories15M", "llama-1k")
METHODS = ("sparsegpt", "wanda")
SHARED_BY_TWO = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
CLI = ["-m", "prunekit", "run"]
COUNT = """
import math, sys
import torch
from torch.profiler import ProfilerActivity, profile
from prunekit.cli import main as cli
from prunekit.sparsify import block_pruner as pruning
from prunekit.methods.sparsegpt import SparseGPT

# The profiler sees what custom operators do inside, which FlopCounterMode does not.
counted = [0]
def counting(real):
    def count(self, *arguments, **options):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            found = real(self, *arguments, **options)
        for event in seen.events():
            outer = event.cpu_parent
            if "mm" in event.name and not (outer and "mm" in outer.name):
                left, right = [shape for shape in event.input_shapes if len(shape) >= 2][-2:]
                counted[0] += 2 * math.prod(left) * right[-1]
        return found
    return count
pruning.BlockPruner._prune_weights = counting(pruning.BlockPruner._prune_weights)
SparseGPT.prepare = counting(SparseGPT.prepare)
code = cli.main(["run", sys.argv[2], "--quiet"])
import os
open(sys.argv[1] + os.environ.get("RANK", "-"), "w").write(str(counted[0]))
sys.exit(code)
"""


def config_text(name: str, method: str, out: Path) -> str:
    """Return a job's config; create missing model and text."""
    if name == "stories15M":
        model, text = SHARED / "models/stories15M", SHARED / "data/tinystories/train.txt"
        samples, length = 64, 256
    else:
        model, (samples, length) = CACHE / name, LLAMA.calibration
        text = model / "text.txt"
        if not (model / "config.json").is_file():
            make(model, LLAMA)
        numbers = torch.randint(VOCABULARY, (10000,), generator=torch.Generator().manual_seed(1))
        text.write_text(" ".join(f"w{number}" for number in numbers.tolist()))
    return f"""
[model]
path = "{model}"
device = "cpu"
[calibration]
data = "{text}"
samples = {samples}
length = {length}
[prune]
method = "{method}"
pattern = "2:4"
[output]
path = "{out}"
"""


def measure(name: str, method: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Return the mean of alternating runs of either kind, and ranks' work."""
    config = folder / "config.toml"
    config.write_text(config_text(name, method, folder / "out"))
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    ranks: list[dict[str, Any]] = []
    nothing = folder / "nothing.py"
    nothing.write_text("")
    launching = timed([sys.executable, *SHARED_BY_TWO, str(nothing)], folder / "log")["seconds"]
    for _ in range(repeats):
        for size, launcher in ((1, []), (2, SHARED_BY_TWO)):
            os.environ["OMP_NUM_THREADS"] = str(2 // size)
            command = [sys.executable, *launcher, *CLI, str(config), "--quiet", "--overwrite"]
            job = timed(command, folder / "log")
            report = json.loads((folder / "out/report.json").read_text())
            seconds = report["seconds"]
            work = seconds["calibrate"] + seconds["prune"]
            found[size].append({"job": job["seconds"], "run": seconds["total"], "prune": work})
            ranks = report.get("ranks", ranks)
    one, two = (
        {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
        for runs in found.values()
    )
    planned = plan(load_config(config), Ranks(0, 2)).traffic
    sent = [{what: rank["sent_bytes"].get(what, 0) for what in planned} for rank in ranks]
    # Every product is an event; a larger model has too many.
    alone, shared = [0], [0, 0]
    if name == "stories15M":
        alone, shared = (count(config, folder, launcher) for launcher in ([], SHARED_BY_TWO))
    return {
        "model": name,
        "method": method,
        "one_process": one,
        "two_processes": two,
        "ratio": {key: two[key] / one[key] for key in one},
        "repeats": repeats,
        "launching": launching,
        "sent_bytes": sent,
        "planned_bytes": dict(planned),
        "as_planned": all(rank == planned for rank in sent),
        "solve_flops": {"one_process": alone[0], "ranks": shared},
        "share_of_solve": [flops / alone[0] if alone[0] else None for flops in shared],
    }


def count(config: Path, folder: Path, launcher: list[str]) -> list[int]:
    """Return the matrix product operations of each rank's solve, by profiler."""
    script, prefix = folder / "count.py", folder / "flops"
    script.write_text(COUNT)
    once = folder / f"count-{len(launcher)}.toml"
    once.write_text(config.read_text().replace(str(folder / "out"), f"{folder}/o{len(launcher)}"))
    timed([sys.executable, *launcher, str(script), str(prefix), str(once)], folder / "log")
    names = ["0", "1"] if launcher else ["-"]
    return [int(Path(f"{prefix}{name}").read_text()) for name in names]


def main() -> None:
    """Measure and rewrite ``bench/results/<machine>/ranks.{json,md}``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--repeats", type=int, default=2, metavar="N")
    given = parser.parse_args()
    machine = describe(torch.device("cpu"))
    folder = RESULTS / machine["name"]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "ranks.json"
    old = json.loads(file.read_text())["jobs"] if file.is_file() else []
    found = {(row["model"], row["method"]): row for row in old}
    for name in given.models:
        for method in given.methods:
            with tempfile.TemporaryDirectory() as place:
                row = {**measure(name, method, Path(place), given.repeats), "machine": machine}
            found[name, method] = row
            print(json.dumps({key: row[key] for key in row if key != "machine"}, indent=1))
            file.write_text(json.dumps({"jobs": [*found.values()]}, indent=1) + "\n")
            (folder / "ranks.md").write_text(table([*found.values()]))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the measurements as a table."""
    lines = [
        "Two processes of a thread each, by torchrun, beside one with two threads, on two cores:",
        "means of a few. Pruning is calibration included, a run all but start-up, a job all;",
        "torchrun is what it takes for two processes that do nothing. The share of the solve is",
        "that of each rank in one process's matrix products.",
        "",
        "| model | method | pruning | run | job | torchrun | each rank sent | as planned "
        "| share of solve |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        one, two = row["one_process"], row["two_processes"]
        times = [f"{one[key]:.1f} → {two[key]:.1f} s" for key in ("prune", "run", "job")]
        sent = f"{sum(row['sent_bytes'][0].values()) / 1e6:.2f} MB"
        shares = [f"{share:.3f}" for share in row["share_of_solve"] if share is not None]
        cells = [
            *times,
            f"{row['launching']:.1f} s" if "launching" in row else "not timed",
            sent,
            "yes" if row["as_planned"] else "no",
            ", ".join(shares) or "not counted",
        ]
        lines.append(f"| {row['model']} | {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
