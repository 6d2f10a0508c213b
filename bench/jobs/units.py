"""Time and peak memory of runs over units: block by block, and with the whole model.

    python -m bench.jobs.units [tinyllama-1.1b | llama-7b | llama-45m] [FOLDER]
        [--samples N LENGTH] [--only NAME …]

Heads and neurons, 30 % by gradient, with a refit, of random weights in bfloat16 that
:mod:`bench.jobs.memory` makes in FOLDER once. Each kind of run is a process of its own, without its
proof and evaluation; the planned bytes are beside those that were measured, and so are the bytes of
the imports alone. A model of 7B is not run as a whole.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.harness.measure import RESULTS, describe, write_json
from bench.jobs.end_to_end import timed
from bench.jobs.memory import SHAPES, make, write_text
from prunekit.config.load import load_config
from prunekit.config.run_config import StructuredConfig
from prunekit.runs.structured.blockwise_run import BlockwiseRun
from prunekit.runs.structured.planner import plan
from prunekit.runs.structured.time_estimate import estimate_time
from prunekit.runs.structured.whole_model_run import WholeModelRun

KINDS = {"by block": BlockwiseRun, "whole model": WholeModelRun}
CONFIG = """
[model]
path = "{model}"
device = "cpu"
[calibration]
data = "{model}/text.txt"
samples = {samples}
length = {length}
[prune]
method = "gradient"
pattern = ["heads", "neurons"]
sparsity = 0.3
compensate = "refit"
[output]
path = "{output}"
"""
_IMPORTS = "import bench.jobs.units"


def carry_out(kind: str, config: Path) -> None:
    """Run a config in this process, without its proof, and print what it took."""
    loaded = load_config(config)
    assert isinstance(loaded, StructuredConfig)
    made = plan(loaded)
    run = KINDS[kind](made)
    began = time.perf_counter()
    for record in run.stoppable_records(resume=False, overwrite=True, stop=lambda: False):
        if (record.kind, record.name) == ("phase", "verify"):
            break
    found = {"seconds": time.perf_counter() - began, "phases": run.seconds}
    found |= {"planned": made.memory, "where": made.where}
    print(json.dumps(found | {"planned_seconds": estimate_time(made).parts}))


def measure(model: Path, calibration: tuple[int, int], kind: str, folder: Path) -> dict[str, Any]:
    """Return what a run took, in a process of its own."""
    samples, length = calibration
    config, log = folder / "run.toml", folder / "log"
    given = {"model": model.absolute(), "samples": samples, "length": length}
    config.write_text(CONFIG.format(**given, output=folder / "out"))
    command = [sys.executable, "-m", "bench.jobs.units", "--row", kind, str(config)]
    row = {"run": kind, **timed(command, log)}
    return row | json.loads(log.read_text().splitlines()[-1])


def main() -> None:
    """Measure and rewrite ``bench/results/<machine>/units-<shape>-<samples>x<length>.json``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", nargs="?", choices=SHAPES, default=next(iter(SHAPES)))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--samples", nargs=2, type=int, default=None, metavar=("N", "LENGTH"))
    parser.add_argument("--only", nargs="*", default=[], choices=KINDS)
    parser.add_argument("--row", nargs=2, help="carry out one run in this process")
    given = parser.parse_args()
    if given.row:
        carry_out(given.row[0], Path(given.row[1]))
        return
    kind, shape = given.shape, SHAPES[given.shape]
    samples, length = given.samples or (4, 128)
    calibration = samples, length
    names = given.only or [*KINDS][: 1 if kind == "llama-7b" else None]
    with tempfile.TemporaryDirectory() as name:
        folder = given.folder or Path(name, "model")
        if not (folder / "config.json").is_file():
            make(folder, shape)
        write_text(folder)
        rows = [measure(folder, calibration, each, Path(name)) for each in names]
        imports = timed([sys.executable, "-c", _IMPORTS], Path(name) / "log")["peak_rss_bytes"]
    machine = describe(torch.device("cpu"))
    found = {"machine": machine, "shape": kind, "samples": calibration, "imports": imports}
    name = f"units-{kind}-{samples}x{length}.json"
    write_json(RESULTS / machine["name"] / name, found | {"rows": rows})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
