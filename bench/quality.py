"""Perplexity of real models, dense and pruned, beside llm-compressor on the same tokens.

    python -m bench.quality [--peer PYTHON] [--models NAME …]

Speed does not matter here, so the machine need not be idle.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.end_to_end import PATTERNS, SHARED, Job, config_text, jobs, judge, run_peer
from bench.harness import RESULTS, describe
from prunekit.config import load_config
from prunekit.errors import ShapeError
from prunekit.planning import plan
from prunekit.running import run

METHODS = ("magnitude", "wanda", "sparsegpt")
PEER_METHODS = ("wanda", "sparsegpt")
PEER = " of llm-compressor"


def all_jobs() -> list[Job]:
    """Return every decoder language model at hand, smallest first."""
    if not (found := jobs()):
        return []
    smollm2, stories = found
    small = [
        replace(stories, name=name, model=SHARED / "models" / name, windows=300)
        for name in ("stories260K", "gpt2-tinystories")
    ]
    return [*small, replace(stories, windows=244), smollm2]


def measure(job: Job, peer: str | None) -> list[dict[str, Any]]:
    """Return a row for each pattern: perplexity by method, ours and the peer's."""
    dense = judge(job, job.model)
    rows = []
    for pattern in PATTERNS:
        row: dict[str, Any] = {"model": job.name, "pattern": pattern, "dense": dense}
        for method in METHODS:
            with tempfile.TemporaryDirectory() as name:
                row |= _perplexities(job, (method, pattern), peer, Path(name))
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _perplexities(
    job: Job, task: tuple[str, str], peer: str | None, folder: Path
) -> dict[str, float | None]:
    method, _ = task
    config = folder / "job.toml"
    config.write_text(config_text(job, *task, folder / "ours"))
    try:
        made = plan(load_config(config))
    except ShapeError:
        return {method: None}
    for _ in run(made):
        pass
    found: dict[str, float | None] = {method: judge(job, folder / "ours")}
    if peer and method in PEER_METHODS:
        run_peer(peer, job, made, task, folder)
        found[f"{method}{PEER}"] = judge(job, folder / "peer")
    return found


COLUMNS = ("dense", "magnitude", "wanda", f"wanda{PEER}", "sparsegpt", f"sparsegpt{PEER}")


def _line(row: dict[str, Any]) -> str:
    found = ("—" if row.get(key) is None else f"{row[key]:.3f}" for key in COLUMNS)
    return f"| {' | '.join([row['model'], row['pattern'], *found])} |"


def main() -> None:
    """Measure and rewrite ``bench/results/<machine>/quality.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="python of an environment with llm-compressor")
    parser.add_argument("--models", nargs="*", help="only these")
    options = parser.parse_args()
    wanted = [job for job in all_jobs() if not options.models or job.name in options.models]
    rows = [row for job in wanted for row in measure(job, options.peer)]
    if not rows:
        return
    machine = describe(torch.device("cpu"))
    folder = RESULTS / machine["name"]
    folder.mkdir(parents=True, exist_ok=True)
    header = [f"| model | pattern | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    found = {"machine": machine, "rows": rows}
    (folder / "quality.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "quality.md").write_text("\n".join([*header, *map(_line, rows)]) + "\n")


if __name__ == "__main__":
    main()
