"""Perplexity of real models, dense and pruned by each method.

    python -m bench.quality.quality [--minutes N] [--models NAME …] [--patterns NAME …] [--seeds N]

Mean and deviation over seeds. Cells already in ``bench/results/quality/quality.json`` are not
measured again, unless the defaults of their method have changed; so it can be run in pieces. A
setting that was added later counts as no change. Speed does not matter: the machine need not be
idle.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import prunekit
from bench.harness.measure import RESULTS, describe, write_json
from bench.jobs.end_to_end import SHARED, Job, jobs
from prunekit.architectures import find_architecture
from prunekit.config.prune_table import Prune
from prunekit.data.tokens import calibration_tokens, evaluation_tokens
from prunekit.errors import ConfigError, ShapeError
from prunekit.evaluation.perplexity import negative_log_likelihood, perplexity_from_loss
from prunekit.models import stock
from prunekit.models.layout import stack_runners
from prunekit.models.sequential.pipeline import iterate_blocks, split_batches

FOLDER = RESULTS / "quality"
PATTERNS = {"50 %": 0.5, "60 %": 0.6, "70 %": 0.7, "80 %": 0.8, "2:4": "2:4", "4:8": "4:8"}
METHODS = {
    "magnitude": {"method": "magnitude"},
    "Wanda": {"method": "wanda"},
    "SparseGPT": {"method": "sparsegpt"},
    "ALPS": {"method": "alps"},
    "ours": {"method": "admm"},
}
OPTIONS = {
    "permuted": {"method": "admm", "permute": True},
    "residual too": {"method": "admm", "permute": "residual"},
    "blocks tuned": {"method": "admm", "recover": "block"},
    "both": {"method": "admm", "permute": True, "recover": "block"},
    "OWL": {"method": "admm", "allocation": "owl"},
    "curves": {"method": "admm", "allocation": "curves"},
}
"""Options of ours; a separate table compares them."""
Cell = dict[str, Any]


def all_jobs() -> list[Job]:
    """Return every available decoder language model, smallest first."""
    if not (found := jobs()):
        return []
    smollm2, stories = found
    small = [
        replace(stories, name=name, model=SHARED / "models" / name, windows=120)
        for name in ("stories260K", "gpt2-tinystories")
    ]
    return [*small, stories, replace(smollm2, samples=16, windows=16)]


def settings_of(method: str, pattern: str) -> dict[str, Any]:
    """Return the section ``[prune]`` of a cell with all its defaults."""
    wanted = PATTERNS[pattern]
    section = {"pattern": wanted} if isinstance(wanted, str) else {"pattern": "unstructured"}
    if not isinstance(wanted, str):
        section["sparsity"] = wanted
    chosen = (METHODS | OPTIONS)[method] | section | {"measure_error": False}
    return Prune.model_validate(chosen).model_dump()


@cache
def _texts(job: Job, seed: int) -> tuple[Tensor, Tensor]:
    tokenizer = stock.read_tokenizer(job.model)
    read = calibration_tokens(tokenizer, [str(job.calibration)], job.samples, job.length, seed)
    return read.ids, evaluation_tokens(
        tokenizer, [str(job.evaluation)], job.length, job.windows
    ).ids


def _model(job: Job) -> PreTrainedModel:
    return stock.open_model(job.model, dtype=torch.float32)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """Return exp of the mean loss of each window's later tokens."""
    loss = 0.0
    parts = split_batches(ids, model.device)
    *_, visit = iterate_blocks(model, stack_runners(model, find_architecture(model)), None, parts)
    for hidden, labels in zip(visit.hidden, parts, strict=True):
        loss += sum(
            negative_log_likelihood(visit.runner, window, label)
            for window, label in zip(hidden, labels, strict=True)
        )
    return perplexity_from_loss(loss, ids.numel() - len(ids))


def measure(job: Job, pattern: str, method: str, seed: int) -> Cell:
    """Return one cell; perplexity None where the pattern does not fit."""
    settings = settings_of(method, pattern)
    cell = {"model": job.name, "pattern": pattern, "method": method, "seed": seed}
    cell |= {"samples": job.samples, "length": job.length, "windows": job.windows}
    model, (read, judged) = _model(job), _texts(job, seed)
    began = time.perf_counter()
    try:
        prunekit.prune(model, read, **settings)
    except (ShapeError, ConfigError) as error:
        print(f"{job.name} {pattern} {method}: {error}")
        return cell | {"settings": settings, "perplexity": None}
    seconds = time.perf_counter() - began
    return cell | {
        "settings": settings,
        "perplexity": perplexity(model, judged),
        "prune_seconds": seconds,
    }


def wanted(chosen: list[Job], seeds: int) -> Iterator[tuple[Job, str, str, int]]:
    """Yield the cells to measure, the most informative first."""
    for seed in range(seeds):
        for job in chosen:
            for pattern, value in PATTERNS.items():
                for method in METHODS | OPTIONS:
                    said = OPTIONS.get(method, {})
                    fits = (
                        not said.get("permute")
                        if isinstance(value, float)
                        else (said.get("allocation") != "owl")
                    )
                    if fits:
                        yield job, pattern, method, seed


def key(cell: Cell) -> tuple[str, ...]:
    """Return the key of a cell."""
    return tuple(str(cell[part]) for part in ("model", "pattern", "method", "seed"))


def save(dense: dict[str, float], cells: dict[tuple[str, ...], Cell]) -> None:
    """Rewrite the JSON, the table and the plot."""
    found = {"machine": describe(torch.device("cpu")), "dense": dense, "cells": [*cells.values()]}
    write_json(FOLDER / "quality.json", found)
    known = [*cells.values()]
    (FOLDER / "quality.md").write_text(table(dense, known, METHODS))
    measured = [cell for cell in known if cell["method"] in {"ours", *OPTIONS}]
    compared = {_of(cell) for cell in measured if cell["method"] in OPTIONS}
    (FOLDER / "options.md").write_text(
        table(dense, [cell for cell in measured if _of(cell) in compared], ["ours", *OPTIONS])
    )


def _of(cell: Cell) -> tuple[str, ...]:
    """Return the key of comparable cells: model, pattern, seed."""
    model, pattern, _, seed = key(cell)
    return model, pattern, seed


def summary(cells: list[Cell]) -> dict[tuple[str, str, str], tuple[float, float, int]]:
    """Return mean, deviation and number of seeds by model, pattern and method."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for cell in cells:
        if cell["perplexity"] is not None:
            name = cell["model"], cell["pattern"], cell["method"]
            groups.setdefault(name, []).append(cell["perplexity"])
    return {
        name: (statistics.mean(found), statistics.stdev(found) if found[1:] else 0.0, len(found))
        for name, found in groups.items()
    }


def table(dense: dict[str, float], cells: list[Cell], methods: Collection[str]) -> str:
    """Return the means of methods as Markdown, lowest in bold."""
    found = summary(cells)
    lines = [
        "Perplexity: mean ± deviation over calibration seeds (their number in brackets where it",
        "is not 3), the lowest mean in bold. Made by `python -m bench.quality.quality`.",
        "",
        f"| model | pattern | dense | {' | '.join(methods)} |",
        "|---" * (len(methods) + 3) + "|",
    ]
    for model, pattern in dict.fromkeys(name[:2] for name in found):
        row = {m: found[name] for m in methods if (name := (model, pattern, m)) in found}
        if not row:
            continue
        best = min(mean for mean, _, _ in row.values())
        shown = (_shown(*row[m], best=best) if m in row else "" for m in methods)
        lines.append(f"| {model} | {pattern} | {dense[model]:.2f} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _shown(mean: float, deviation: float, seeds: int, *, best: float) -> str:
    text = f"{mean:.4g}" if mean >= 1000 or math.isinf(mean) else f"{mean:.2f}"
    text = f"**{text}**" if mean == best else text
    return text + (f" ± {deviation:.2g}" if seeds > 1 else "") + (f" ({seeds})" * (seeds != 3))


def plot(dense: dict[str, float], cells: list[Cell], file: Path) -> None:
    """Draw the perplexity added by pruning, a panel per model."""
    from matplotlib.figure import Figure

    found = summary(cells)
    models = [model for model in dense if any(name[0] == model for name in found)]
    figure = Figure(figsize=(4.2 * len(models), 3.6), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for method in METHODS:
            points = [
                (100 * value, found[model, name, method][:2])
                for name, value in PATTERNS.items()
                if isinstance(value, float) and (model, name, method) in found
            ]
            if points:
                means = [mean - dense[model] for _, (mean, _) in points]
                spread = [deviation for _, (_, deviation) in points]
                axes.errorbar([at for at, _ in points], means, spread, label=method, marker="o")
        axes.set(title=model, yscale="log", xlabel="sparsity, %")
        axes.set_ylabel("perplexity above the dense model's")
    figure.axes[0].legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure missing cells and rewrite the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--patterns", nargs="*", default=PATTERNS, help="only these")
    parser.add_argument("--methods", nargs="*", default=METHODS, help="only these, also of OPTIONS")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds: 0 to N - 1")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after these")
    options = parser.parse_args()
    began = time.monotonic()
    file = FOLDER / "quality.json"
    known = json.loads(file.read_text()) if file.is_file() else {"dense": {}, "cells": []}
    dense, cells = known["dense"], {key(cell): cell for cell in known["cells"]}
    chosen = [job for job in all_jobs() if not options.models or job.name in options.models]
    for job, pattern, method, seed in wanted(chosen, options.seeds):
        if method not in options.methods or pattern not in options.patterns:
            continue
        before = cells.get((job.name, pattern, method, str(seed)))
        if before and before["settings"].items() <= settings_of(method, pattern).items():
            continue
        if time.monotonic() - began > 60 * options.minutes:
            break
        if job.name not in dense:
            dense[job.name] = perplexity(_model(job), _texts(job, 0)[1])
        cell = measure(job, pattern, method, seed)
        cells[key(cell)] = cell
        print(*key(cell), cell["perplexity"], flush=True)
        save(dense, cells)
    if cells:
        save(dense, cells)
        plot(dense, [*cells.values()], FOLDER / "quality.png")


if __name__ == "__main__":
    main()
