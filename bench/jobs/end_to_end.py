"""Time whole pruning jobs beside llm-compressor on the same tokens.

    python -m bench.jobs.end_to_end [--peer PYTHON] [--models NAME …]

Each job is its own process. PYTHON is the interpreter of an environment with llm-compressor (its
pins differ from ours); without one the peer is left out, with a notice. SmolLM2-135M comes from
PyPI, stories15M from ../shared. Run it on an idle machine only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.harness.measure import RESULTS, describe
from prunekit.cli.demo import smollm2
from prunekit.config.load import load_config
from prunekit.data.tokens import calibration_tokens
from prunekit.evaluation.perplexity import evaluate
from prunekit.inference.layer_speed import product_rate
from prunekit.runs.sparsify.plan import Plan
from prunekit.runs.sparsify.planner import plan
from prunekit.statistics import Gram

SHARED = Path(__file__).parents[3] / "shared"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prunekit"
PATTERNS = {"50 %": 0.5, "60 %": 0.6, "2:4": "2:4", "4:8": "4:8"}
TIMED = ("50 %", "2:4")
PEER = "llm-compressor"
STAGE = " by stage"
"""Suffix of a method whose stages see the outputs of the pruned ones before."""
BY_STAGE = 'prune.propagation="stage"'
RATIOS = ("seconds", "job_seconds", "peak_rss_bytes")
WIDE = " in float32"
"""Suffix of the peer in float32 where prunekit runs in the stored, narrower dtype."""


@dataclass(frozen=True)
class Job:
    """A model with its calibration and evaluation texts."""

    name: str
    model: Path
    calibration: Path
    samples: int
    length: int
    evaluation: Path
    windows: int


def jobs() -> list[Job]:
    """Return the jobs whose files exist; print which are missing."""
    found = []
    if not SHARED.is_dir():
        print(f"{SHARED} is absent: no text to calibrate on, nothing is measured.")
        return found
    wikitext, stories = SHARED / "data/wikitext2", SHARED / "data/tinystories"
    model = smollm2(CACHE / "smollm2-135m-instruct")
    found.append(
        Job(
            "SmolLM2-135M", model, wikitext / "valid.tokens.txt", 32, 512, wikitext / "test.txt", 32
        )
    )
    model = SHARED / "models/stories15M"
    found.append(
        Job("stories15M", model, stories / "train.txt", 64, 256, stories / "valid.txt", 60)
    )
    return found


def config_text(job: Job, method: str, pattern: str, out: Path) -> str:
    """Return the config of one job."""
    wanted = PATTERNS[pattern]
    return f"""
[model]
path = "{job.model}"
[calibration]
data = "{job.calibration}"
samples = {job.samples}
length = {job.length}
[prune]
method = "{method}"
pattern = "{wanted if isinstance(wanted, str) else "unstructured"}"
{f"sparsity = {wanted}" if isinstance(wanted, float) else ""}
[output]
path = "{out}"
"""


LAUNCHER = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(
    sys.argv[2:], stdin=subprocess.DEVNULL, stdout=open(sys.argv[1], "wb"), stderr=subprocess.STDOUT
)
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - began
print(json.dumps([status, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]))
"""


def timed(command: list[str], log: Path) -> dict[str, float]:
    """Run a process to its end; return its time and memory.

    A small launcher starts it, since a process inherits the peak resident memory of its parent.
    """
    launcher = [sys.executable, "-S", "-c", LAUNCHER, str(log), *command]
    finished = subprocess.run(
        launcher, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    status, seconds, cpu_seconds, peak = json.loads(finished.stdout)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_rss_bytes": peak}


def floor_flops(made: Plan) -> dict[str, float]:
    """Return a job's least operations: forwards, Gram products, solve."""
    calibration = made.config.calibration
    assert calibration is not None
    tokens = calibration.samples * made.lengths[0]
    weights = sum(linear.size for linear in made.linears)
    attention = 2 * tokens * made.lengths[0] * made.stacks[0].features * len(made.blocks)
    grams = [kind.sample_stride for kind in made.recipe.needs if issubclass(kind, Gram)]
    gram = tokens * sum(stage[0].inputs ** 2 for block in made.blocks for stage in block.stages)
    solve = sum(
        2 * stage[0].inputs ** 3 // 3 + sum(linear.size * linear.inputs for linear in stage)
        for block in made.blocks
        for stage in block.stages
    )
    gathers = Gram in made.recipe.method.needs
    return {
        "forward": (1 + (made.recipe.propagation != "stage")) * (2 * tokens * weights + attention),
        "gram": gram // grams[0] if grams else 0,
        "solve": solve if gathers else 0,
    }


def floor_seconds(flops: dict[str, float], dtype: torch.dtype) -> float:
    """Return the time of these operations at the measured product rates.

    Forwards run in ``dtype``, the rest in float32.
    """
    rates = {kind: product_rate(torch.device("cpu"), kind) for kind in {dtype, torch.float32}}
    return sum(
        count / rates[dtype if name == "forward" else torch.float32]
        for name, count in flops.items()
    )


def measure(job: Job, method: str, pattern: str, peer: str | None) -> Iterator[dict[str, Any]]:
    """Run one job with prunekit, each way, and once with the peer.

    Args:
        job: Model and texts.
        method: Name of the method.
        pattern: Key of ``PATTERNS``.
        peer: Interpreter of an environment with llm-compressor, or None.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs: dict[str, dict[str, float]] = {}
        for said in (method, method + STAGE) if method == "sparsegpt" else (method,):
            config, changes = folder / "job.toml", [BY_STAGE] if said != method else []
            config.write_text(config_text(job, method, pattern, folder / said))
            made = plan(load_config(config, changes))
            row: dict[str, Any] = {"model": job.name, "method": said, "pattern": pattern}
            row["floor_flops"], row["dtype"] = floor_flops(made), str(made.dtype)
            row["floor_seconds"] = floor_seconds(row["floor_flops"], made.dtype)
            command = [sys.executable, "-m", "prunekit", "run", str(config), "--quiet"]
            command += [part for change in changes for part in ("--set", change)]
            row["prunekit"] = timed(command, folder / "ours.log")
            seconds = json.loads((folder / said / "report.json").read_text())["seconds"]
            row["prunekit"]["prune_seconds"] = seconds["prune"]
            row["prunekit"]["job_seconds"] = seconds["total"]
            row["prunekit"]["perplexity"] = judge(job, folder / said)
            if peer and not theirs:
                theirs[PEER] = run_peer(peer, job, made, (method, pattern), folder)
                theirs[PEER]["perplexity"] = judge(job, folder / "peer")
                if made.dtype != torch.float32:
                    wide = replace(made, dtype=torch.float32)
                    theirs[PEER + WIDE] = run_peer(peer, job, wide, (method, pattern), folder)
            yield row | theirs


def run_peer(
    peer: str, job: Job, made: Plan, task: tuple[str, str], folder: Path
) -> dict[str, float]:
    """Prune the same model on the same tokens with llm-compressor.

    It runs in the dtype of the plan: in bfloat16 it is faster than in float32 and takes less
    memory. The result is in ``folder / "peer"``.
    """
    method, pattern = task
    calibration = made.config.calibration
    assert calibration is not None
    tokens = calibration_tokens(
        made.tokenizer, calibration.data, job.samples, made.lengths[0], calibration.seed
    )
    save_file({"ids": tokens.ids}, folder / "ids.safetensors")
    script = Path(__file__).with_name("peer_llmcompressor.py")
    arguments = (
        *(job.model, folder / "ids.safetensors", method, PATTERNS[pattern], folder / "peer"),
        str(made.dtype).removeprefix("torch."),
    )
    log = folder / "peer.log"
    found = timed([peer, str(script), *map(str, arguments)], log)
    return found | {"job_seconds": float(log.read_text().splitlines()[-1])}


def judge(job: Job, folder: Path) -> float:
    """Return a pruned folder's perplexity on the job's evaluation text."""
    return evaluate(str(folder), [str(job.evaluation)], job.length, job.windows)[0]["value"]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        f"| job | pattern | prunekit | {PEER} | time | without start | memory | perplexity "
        f"| floor | % | {PEER}{WIDE} | time | memory |",
        "|---" * 13 + "|",
    ]
    for row in rows:
        ours, peer, wide = row["prunekit"], row.get(PEER), row.get(PEER + WIDE)
        floor = row.get("floor_seconds")  # older rows may lack it
        cells = [f"{row['model']} {row['method']}", row["pattern"], _cell(ours)]
        if peer:
            cells += [
                _cell(peer),
                *(_ratio(ours, peer, what) for what in RATIOS),
                f"{ours['perplexity']:.3f} / {peer['perplexity']:.3f}",
            ]
        else:
            cells += ["absent", "", "", "", f"{ours['perplexity']:.3f}"]
        cells += [f"{floor:.1f} s", f"{floor / ours['prune_seconds']:.0%}"] if floor else ["—", ""]
        ratios = (_ratio(ours, wide, what) for what in RATIOS[::2]) if wide else ("", "")
        cells += [_cell(wide) if wide else "", *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(ours: dict[str, float], peer: dict[str, float], what: str) -> str:
    return f"{ours[what] / peer[what]:.2f}" if what in ours and what in peer else "—"


def _cell(result: dict[str, float]) -> str:
    return f"{result['seconds']:.1f} s, {result['peak_rss_bytes'] / 2**30:.2f} GiB"


def main() -> None:
    """Measure all jobs and rewrite ``bench/results/<machine>/end_to_end.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="python of an environment with llm-compressor")
    parser.add_argument(
        "--models", nargs="*", default=[], help="only these; the rows of others stay"
    )
    options = parser.parse_args()
    if not options.peer:
        print("llm-compressor: left out, give its interpreter with --peer")
    device = torch.device("cpu")
    machine = describe(device)
    file = RESULTS / machine["name"] / "end_to_end.json"
    rows = json.loads(file.read_text())["rows"] if options.models and file.is_file() else []
    rows = [row for row in rows if row["model"] not in options.models]
    for job in (job for job in jobs() if not options.models or job.name in options.models):
        for method in ("sparsegpt", "wanda"):
            for pattern in TIMED:
                for row in measure(job, method, pattern, options.peer):
                    rows.append(row)
                    _write(machine, rows)
                    print(table([row]).splitlines()[-1], flush=True)


def _write(machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    folder = RESULTS / machine["name"]
    folder.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine, "rows": rows}
    (folder / "end_to_end.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "end_to_end.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
