"""Perplexity of real models pruned by us and by llm-compressor, on the same tokens.

    python -m bench.peer_quality [--peer PYTHON] [--models NAME …]

What is in ``bench/results/<machine>/peer_quality.json`` already is not measured again, so that it
can be run in pieces. Speed does not matter here: the machine need not be idle.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.end_to_end import PATTERNS, SHARED, Job, config_text, jobs, judge, run_peer
from bench.harness import RESULTS, describe
from prunekit.config import load_config
from prunekit.errors import ShapeError
from prunekit.planning import plan
from prunekit.running import run

STAGE = " by stage"
"""Each stage sees what the pruned ones before it give; as published, and by default, each block."""
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


def measure(job: Job, pattern: str, peer: str | None, known: Row) -> Row:
    """Return a row: perplexity dense, and by each method, ours and the peer's."""
    row: Row = {"model": job.name, "pattern": pattern, "dense": _dense(job)} | known
    for method in METHODS:
        if method in row:
            continue
        with tempfile.TemporaryDirectory() as name:
            row |= _perplexities(job, (method, pattern), peer, Path(name))
    return row


@cache
def _dense(job: Job) -> float:
    return judge(job, job.model)


def _perplexities(
    job: Job, task: tuple[str, str], peer: str | None, folder: Path
) -> dict[str, float | None]:
    variant, pattern = task
    method = variant.removesuffix(STAGE)
    config = folder / "job.toml"
    config.write_text(config_text(job, method, pattern, folder / "ours"))
    try:
        made = plan(load_config(config, ['prune.propagation="stage"'] if method != variant else []))
    except ShapeError:
        return {variant: None}
    for _ in run(made):
        pass
    found: dict[str, float | None] = {variant: judge(job, folder / "ours")}
    if peer and variant in PEER_METHODS:
        run_peer(peer, job, made, (method, pattern), folder)
        found[f"{method}{PEER}"] = judge(job, folder / "peer")
    return found


COLUMNS = (
    *("dense", "magnitude", "wanda", f"wanda{PEER}", "sparsegpt", f"sparsegpt{PEER}"),
    *(f"sparsegpt{STAGE}", "admm"),
)


def _key(row: Row) -> tuple[str, str]:
    return row["model"], row["pattern"]


def _line(row: Row) -> str:
    found = ("—" if row.get(key) is None else f"{row[key]:.3f}" for key in COLUMNS)
    return f"| {' | '.join([row['model'], row['pattern'], *found])} |"


def rows(peer: str | None, models: list[str] | None, known: list[Row]) -> Iterator[Row]:
    """Yield the rows that are asked for and not known, or not known whole."""
    measured = {_key(row): row for row in known}
    for job in all_jobs():
        for pattern in PATTERNS:
            row = measured.get((job.name, pattern), {})
            if (not models or job.name in models) and not row.keys() >= {*METHODS}:
                yield measure(job, pattern, peer, row)


def main() -> None:
    """Measure and rewrite ``bench/results/<machine>/peer_quality.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="python of an environment with llm-compressor")
    parser.add_argument("--models", nargs="*", help="only these")
    options = parser.parse_args()
    if not options.peer:
        print("llm-compressor: left out, give its interpreter with --peer")
    machine = describe(torch.device("cpu"))
    folder = RESULTS / machine["name"]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "peer_quality.json"
    known: list[Row] = json.loads(file.read_text())["rows"] if file.is_file() else []
    header = [f"| model | pattern | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for row in rows(options.peer, options.models, [*known]):
        known = [old for old in known if _key(old) != _key(row)] + [row]
        print(_line(row), flush=True)
        file.write_text(json.dumps({"machine": machine, "rows": known}, indent=1) + "\n")
        file.with_suffix(".md").write_text("\n".join([*header, *map(_line, known)]) + "\n")


if __name__ == "__main__":
    main()
