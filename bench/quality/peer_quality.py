"""Perplexity of real models pruned by us and by llm-compressor.

    python -m bench.quality.peer_quality [--peer PYTHON] [--models NAME …] [--patterns NAME …]
        [--methods NAME …] [--seeds N]

Both use the same tokens. Cells already in ``bench/results/<machine>/peer_quality.json`` are not
measured again, so it can be run in pieces. Speed does not matter: the machine need not be idle.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.harness.measure import RESULTS, describe
from bench.jobs.end_to_end import (
    BY_STAGE,
    PATTERNS,
    SHARED,
    STAGE,
    Job,
    config_text,
    jobs,
    judge,
    run_peer,
)
from prunekit.config.load import load_config
from prunekit.errors import ShapeError
from prunekit.runs.sparsify.planner import plan
from prunekit.runs.sparsify.run import run

METHODS = ("magnitude", "wanda", "sparsegpt", f"sparsegpt{STAGE}", "admm")
PEER_METHODS = ("wanda", "sparsegpt")
PEER = " of llm-compressor"
Row = dict[str, Any]


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


def measure(job: Job, known: Row, methods: Collection[str], peer: str | None) -> Row:
    """Return a row: perplexity dense, by our methods, by the peer's.

    Args:
        job: Model and texts.
        known: The row so far.
        methods: Methods to measure.
        peer: Interpreter of an environment with llm-compressor, or None.
    """
    row: Row = known if "dense" in known else {"dense": _dense(job)} | known
    for method in methods:
        if row.keys() >= _columns(method, peer):
            continue
        with tempfile.TemporaryDirectory() as name:
            row |= _perplexities(job, method, row, peer, Path(name))
    return row


def _columns(method: str, peer: str | None) -> set[str]:
    """Return the columns of a method: ours, and the peer's if available."""
    return {method, f"{method}{PEER}"} if peer and method in PEER_METHODS else {method}


@cache
def _dense(job: Job) -> float:
    return judge(job, job.model)


def _perplexities(
    job: Job, variant: str, row: Row, peer: str | None, folder: Path
) -> dict[str, float | None]:
    method, pattern = variant.removesuffix(STAGE), row["pattern"]
    config = folder / "job.toml"
    config.write_text(config_text(job, method, pattern, folder / "ours"))
    changes = [f"calibration.seed={row['seed']}"]
    if method != variant:
        changes.append(BY_STAGE)
    try:
        made = plan(load_config(config, changes))
    except ShapeError:
        return dict.fromkeys(_columns(variant, peer))
    if variant not in row:
        for _ in run(made):
            pass
    ours = row[variant] if variant in row else judge(job, folder / "ours")
    found: dict[str, float | None] = {variant: ours}
    if peer and variant in PEER_METHODS:
        run_peer(peer, job, made, (method, pattern), folder)
        found[f"{method}{PEER}"] = judge(job, folder / "peer")
    return found


COLUMNS = (
    *("dense", "magnitude", "wanda", f"wanda{PEER}", "sparsegpt", f"sparsegpt{PEER}"),
    *(f"sparsegpt{STAGE}", "admm"),
)


def _key(row: Row) -> tuple[str, str, int]:
    return row["model"], row["pattern"], row["seed"]


def table(known: list[Row]) -> str:
    """Return the rows as Markdown; several seeds as mean ± deviation."""
    lines = [f"| model | pattern | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for model, pattern in dict.fromkeys(_key(row)[:2] for row in known):
        of = [row for row in known if _key(row)[:2] == (model, pattern)]
        cells = (_cell([row[name] for row in of if row.get(name)]) for name in COLUMNS)
        lines.append(f"| {' | '.join([model, pattern, *cells])} |")
    return "\n".join(lines) + "\n"


def _cell(found: list[float]) -> str:
    if not found:
        return "—"
    several = f" ± {statistics.stdev(found):.2g} ({len(found)})" if found[1:] else ""
    return f"{statistics.mean(found):.3f}{several}"


def main() -> None:
    """Measure and rewrite ``bench/results/<machine>/peer_quality.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="python of an environment with llm-compressor")
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--patterns", nargs="*", default=PATTERNS, help="only these")
    parser.add_argument("--methods", nargs="*", default=METHODS, help="only these")
    parser.add_argument("--seeds", type=int, default=1, help="of the calibration, from 0")
    options = parser.parse_args()
    if not options.peer:
        print("llm-compressor: left out, give its interpreter with --peer")
    machine = describe(torch.device("cpu"))
    folder = RESULTS / machine["name"]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "peer_quality.json"
    found: list[Row] = json.loads(file.read_text())["rows"] if file.is_file() else []
    known = {_key(row): row for row in found}
    chosen = [job for job in all_jobs() if not options.models or job.name in options.models]
    cells = [(j, p, n) for j in chosen for p in options.patterns for n in range(options.seeds)]
    for job, pattern, seed in cells:
        row: Row = {"model": job.name, "pattern": pattern, "seed": seed}
        key = _key(row)
        row = known.get(key, row)
        if all(row.keys() >= _columns(method, options.peer) for method in options.methods):
            continue
        known[key] = measure(job, row, options.methods, options.peer)
        print(table([known[key]]).splitlines()[-1], flush=True)
        rows = [*known.values()]
        file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
