"""Perplexity of pruned models in few bits: zeros that stay, zeros that are filled again.

    python -m bench.quality.quantize [--models NAME …] [--patterns NAME …] [--scheme int4]

Contestants, all with scales by the same rule: each weight of the pruned model rounded to nearest
(RTN); GPTQ as published on the pruned model, which has no mask, so that zeros take up errors too
(as in llm-compressor); ours on the pruned model (``prunekit quantize``), and in the run that prunes
(``[output] quantize``). Rows already in ``bench/results/quality/quantize.json`` are not measured
again. The machine need not be idle.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.harness.measure import write_json
from bench.jobs.end_to_end import Job
from bench.quality.quality import FOLDER, PATTERNS, _model, _texts, all_jobs, perplexity
from prunekit.methods.layer import Layer
from prunekit.methods.quantize import Quantization, Quantized
from prunekit.models.layout import Linear
from prunekit.runs.sparsify.quantization import GROUPS, quantized_bytes
from prunekit.sparsify import quantize_rows
from prunekit.sparsify.in_memory import ModelPruner, prune_table
from prunekit.sparsify.recipe import Recipe
from prunekit.statistics import Gram
from prunekit.structured.block_batches import block_batches

MODELS = ("stories15M", "SmolLM2-135M")
FILE = FOLDER / "quantize.json"
CONTESTANTS = ("dense", "pruned", "RTN", "GPTQ, refilled", "ours, after", "ours, in the run")
Row = dict[str, Any]


def refilling(
    layer: Layer,
    pruned: Tensor,
    quantization: Quantization,
    dtype: torch.dtype,
    *,
    compensate: bool = True,
) -> Quantized:
    """Return a weight by GPTQ without a mask: all columns take up errors.

    Arguments as in :func:`prunekit.methods.quantize.quantize`.
    """
    from prunekit_kernels import Grid, grid_scales, inverse_factor, obs_sweep, spread

    assert compensate
    gram, inputs = layer.stats[Gram].full, pruned.shape[1]
    group = quantization.group or inputs
    scale = grid_scales(pruned, quantization.scheme, group, dtype, gram.diagonal())
    weight, every = pruned.clone(), torch.ones_like(pruned, dtype=torch.bool)
    grid = Grid(spread(scale, inputs), quantization.scheme)
    obs_sweep(weight, inverse_factor(gram, 0.01).upper, every, grid=grid)
    return Quantized(weight, scale)


def pruner(
    model: PreTrainedModel, ids: Tensor, section: dict[str, Any], how: Quantization | None
) -> ModelPruner:
    """Return what prunes a model in memory, and quantizes it where that is asked for."""
    table = prune_table({"measure_error": False, **section})
    recipe = replace(Recipe.of(table, calibrated=True), quantize=how)
    return ModelPruner.of(model, block_batches(ids, model), table, recipe)


def carry_out(made: ModelPruner) -> list[Row]:
    """Prune the model; return the record of each linear."""
    return [each.as_record() for each in made.prune(made.allocate(made.section.sparsity))]


def measures(
    job: Job, method: str, pattern: str, scheme: str, done: set[str]
) -> Iterator[tuple[str, Row]]:
    """Yield the row of each contestant that is not done, by its name."""
    read, judged = _texts(job, 0)
    wanted = PATTERNS[pattern]
    shape = {"pattern": wanted} if isinstance(wanted, str) else {"pattern": "unstructured"}
    given = {"method": method, **shape}
    if not isinstance(wanted, str):
        given["sparsity"] = wanted
    nothing = {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.0}
    model = _model(job)
    made = pruner(model, read, given, None)
    linears = made.linears
    names = [f"{linear.name}.weight" for linear in linears]
    how = quantization(linears, scheme)
    if "dense" not in done:
        yield "dense", row(model, judged, dict.fromkeys(names), linears, None)
    carry_out(made)
    # As it is written; the contestants read that from the files.
    kept = {name: value.bfloat16().float() for name, value in model.state_dict().items()}
    zeros = {name: kept[name] == 0 for name in names}
    contestants: dict[str, tuple[Callable[..., Quantized] | None, Quantization | None]] = {
        "pruned": (None, None),
        "RTN": (quantize_rows.quantize, replace(how, compensates=False)),
        "GPTQ, refilled": (refilling, how),
        "ours, after": (quantize_rows.quantize, how),
    }
    ours = quantize_rows.quantize
    for name, (solver, scheme_of) in contestants.items():
        if name in done:
            continue
        model.load_state_dict(kept)
        if solver:
            quantize_rows.quantize = solver
            carry_out(pruner(model, read, nothing, scheme_of))
            quantize_rows.quantize = ours
        yield name, row(model, judged, zeros, linears, scheme_of)
    if "ours, in the run" not in done:
        model = _model(job)
        records = carry_out(pruner(model, read, given, how))
        assert not any(record["refilled"] for record in records)
        yield "ours, in the run", row(model, judged, dict.fromkeys(names), linears, how)


def quantization(linears: list[Linear], scheme: str) -> Quantization:
    """Return how a run would round these linears."""
    group = next((g for g in GROUPS if not any(each.inputs % g for each in linears)), None)
    return Quantization(scheme, group if scheme == "int4" else None, compensates=True)  # pyright: ignore


def row(
    model: PreTrainedModel,
    judged: Tensor,
    zeros: Mapping[str, Tensor | None],
    linears: list[Linear],
    how: Quantization | None,
) -> Row:
    """Return the measurements of one contestant; sizes are those of 16-bit files.

    ``zeros``: those of each weight before it was rounded; None for its own.
    """
    weights = {name: model.get_parameter(name) for name in zeros}
    masks = {name: weights[name] == 0 if mask is None else mask for name, mask in zeros.items()}
    still = sum(int((weights[name] == 0)[mask].sum()) for name, mask in masks.items())
    dense = 2 * sum(prod(value.shape) for value in model.parameters())
    stored = {linear.name: torch.bfloat16 for linear in linears}
    size = quantized_bytes(dense, linears, stored, how) if how else dense
    return {
        "perplexity": perplexity(model, judged),
        "bytes": size,
        "zeros": sum(int((weight == 0).sum()) for weight in weights.values()),
        "zeros_kept": still / max(1, sum(int(mask.sum()) for mask in masks.values())),
        "broken_groups": broken(weights.values()),
    }


def broken(weights: Any) -> float:  # noqa: ANN401
    """Return the fraction of groups of four with more than two weights."""
    counts = [(weight != 0).unflatten(1, (-1, 4)).sum(2) for weight in weights]
    return sum(int((each > 2).sum()) for each in counts) / sum(each.numel() for each in counts)


def table(results: dict[str, dict[str, Row]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "Perplexity of pruned models whose linears are rounded to few bits; by",
        "`python -m bench.quality.quantize`. Zeros kept: the fraction of those before rounding",
        "that are zero after it. Sizes are those of the whole model, embeddings in 16 bits.",
        "",
        "| model, method, pattern, scheme | contestant | perplexity | zeros kept | broken 2:4 "
        "| size |",
        "|---|---|---|---|---|---|",
    ]
    for where, rows in results.items():
        for name, found in rows.items():
            groups = f"{found['broken_groups']:.1%}" if "2:4" in where else ""
            lines.append(
                f"| {where} | {name} | {found['perplexity']:.3f} | {found['zeros_kept']:.2%} "
                f"| {groups} | {found['bytes'] / 1e6:.1f} MB |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure missing rows and rewrite the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--patterns", nargs="*", default=("50 %", "2:4"))
    parser.add_argument("--methods", nargs="*", default=("sparsegpt",))
    parser.add_argument("--scheme", default="int4")
    parser.add_argument("--samples", type=int, help="of the calibration text")
    parser.add_argument("--windows", type=int, help="of the text that is judged")
    parser.add_argument("--contestants", nargs="*", help="all if left out")
    options = parser.parse_args()
    results = json.loads(FILE.read_text()) if FILE.is_file() else {}
    for job in (job for job in all_jobs() if job.name in options.models):
        job = replace(  # noqa: PLW2901  the same with other sizes
            job,
            samples=options.samples or job.samples,
            windows=options.windows or job.windows,
        )
        for method in options.methods:
            for pattern in options.patterns:
                where = f"{job.name}, {method}, {pattern}, {options.scheme}"
                rows = results.setdefault(where, {})
                left_out = {*CONTESTANTS} - {*(options.contestants or CONTESTANTS)}
                done = left_out.union(rows)
                for name, found in measures(job, method, pattern, options.scheme, done):
                    sizes = {"samples": job.samples, "length": job.length, "windows": job.windows}
                    rows[name] = found | sizes
                    print(where, name, found, flush=True)
                    write_json(FILE, results)
                    FILE.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
