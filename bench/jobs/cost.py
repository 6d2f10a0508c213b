"""Time whole jobs of the default method beside SparseGPT's.

    python -m bench.jobs.cost [--models NAME …] [--rounds N]

Each job is its own process. The default may take 2.5 times as long, and hold the dense model's
hidden states and one more Gram matrix. Rounds alternate, and the least time of a job counts. Run it
on an idle machine only.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch

from bench.harness.measure import RESULTS, describe
from bench.jobs.end_to_end import TIMED, Job, config_text, jobs, timed
from prunekit.config.load import load_config
from prunekit.runs.jobs import plan
from prunekit.runs.sparsify.plan import Plan
from prunekit.statistics import Gram

METHODS = ("sparsegpt", "admm")
MOST = 2.5


def run(job: Job, method: str, pattern: str) -> dict[str, float]:
    """Run one job; return its time and memory, measured and planned.

    Args:
        job: Model and texts.
        method: Name of the method.
        pattern: Key of ``PATTERNS``.
    """
    with tempfile.TemporaryDirectory() as name:
        config = Path(name) / "job.toml"
        config.write_text(config_text(job, method, pattern, Path(name) / "out"))
        made = cast("Plan", plan(load_config(config)))
        command = [sys.executable, "-m", "prunekit", "run", str(config), "--quiet"]
        found = timed(command, Path(name) / "log")
        seconds = json.loads((Path(name) / "out/report.json").read_text())["seconds"]
    gram = max(Gram.nbytes(linear.inputs) for linear in made.linears)
    facts = {"prune_seconds": seconds["prune"], "calibrate_seconds": seconds["calibrate"]}
    return found | facts | {"hidden_bytes": made.memory.hidden, "gram_bytes": gram}


def measure(job: Job, pattern: str, rounds: int) -> dict[str, Any]:
    """Return the least time of each method.

    Args:
        job: Model and texts.
        pattern: Key of ``PATTERNS``.
        rounds: Runs of each method.
    """
    best: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for method in METHODS:
            found = run(job, method, pattern)
            if method not in best or found["seconds"] < best[method]["seconds"]:
                best[method] = found
    return {"model": job.name, "pattern": pattern, **best}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "Whole jobs, start and imports included. More memory: the peak of admm less that of",
        "SparseGPT, beside one Gram matrix of the widest layer and one more hidden state.",
        "Made by `python -m bench.jobs.cost`.",
        "",
        "| job | pattern | SparseGPT | admm | times | in the block loop | more memory | allowed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs, ours = row["sparsegpt"], row["admm"]
        more = ours["peak_rss_bytes"] - theirs["peak_rss_bytes"]
        allowed = ours["gram_bytes"] + theirs["hidden_bytes"]
        cells = [
            row["model"],
            row["pattern"],
            f"{theirs['seconds']:.1f} s",
            f"{ours['seconds']:.1f} s",
            f"{ours['seconds'] / theirs['seconds']:.2f} (at most {MOST})",
            f"{ours['prune_seconds'] / theirs['prune_seconds']:.2f}",
            f"{more / 2**20:.0f} MiB",
            f"{allowed / 2**20:.0f} MiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all jobs and rewrite ``bench/results/<machine>/cost.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    machine, rows = describe(torch.device("cpu")), []
    folder = RESULTS / machine["name"]
    folder.mkdir(parents=True, exist_ok=True)
    for job in (job for job in jobs() if not options.models or job.name in options.models):
        for pattern in TIMED:
            rows.append(measure(job, pattern, options.rounds))
            found = {"machine": machine, "rows": rows}
            (folder / "cost.json").write_text(json.dumps(found, indent=1) + "\n")
            (folder / "cost.md").write_text(table(rows) + "\n")
            print(table(rows[-1:]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
