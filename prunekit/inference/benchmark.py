"""The command ``prunekit bench``: measure speed and write the results."""

import io
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from prunekit.checkpoint.atomic import write_atomically
from prunekit.checkpoint.output_path import nearest_existing_folder
from prunekit.errors import ConfigError
from prunekit.formatting import number, size
from prunekit.inference.layer_speed import SpeedResults, SpeedRow, measure_layers
from prunekit.inference.model_speed import compare_models, compressible_shapes
from prunekit.models.devices import resolve_device
from prunekit.models.memory import report_exhausted
from prunekit.reports.environment import environment

PROMPT_TOKENS, NEW_TOKENS = 512, 64
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def run_benchmark(
    model: str | None, output: Path, tokens: Sequence[int], device: str, dtype: str
) -> Iterator[str]:
    """Yield a line of text per measurement, then the verdicts.

    Args:
        model: Folder or name of a pruned checkpoint whose shapes to measure; None for
            typical shapes.
        output: Folder for ``speed.json`` and ``speed.svg``.
        tokens: Numbers of tokens to multiply at once; empty for defaults.
        device: Device as in a config.
        dtype: "auto", "bfloat16", "float16" or "float32".

    Raises:
        ConfigError: The dtype or a number of tokens is invalid, or the model is not sparse.
    """
    with report_exhausted():
        yield from _run(model, output, tokens, device, dtype)


def _run(
    model: str | None, output: Path, tokens: Sequence[int], device: str, dtype: str
) -> Iterator[str]:
    nearest_existing_folder(output, "--output")
    target, compute_dtype, shapes = _parse_options(model, tokens, device, dtype)
    results: SpeedResults | None = None
    for row in measure_layers(target, compute_dtype, shapes, tokens or None):
        if isinstance(row, SpeedResults):
            results = row
            continue
        yield _line(row)
    assert results is not None
    if model:
        results.models = compare_models(model, target, PROMPT_TOKENS, NEW_TOKENS)
        for entry in results.models:
            yield (
                f"{entry['layers']:12} prefill {number(entry['prefill_tokens_per_second'])} "
                f"tokens/s, decode {number(entry['decode_tokens_per_second'])} tokens/s, "
                f"{size(entry['resident_bytes'])} of weights"
            )
    for file in write_results(results, environment(target), output):
        yield f"written: {file}"
    yield from results.to_json()["verdicts"]


def _parse_options(
    model: str | None, tokens: Sequence[int], device: str, dtype: str
) -> tuple[torch.device, torch.dtype, list[tuple[int, int]] | None]:
    target = resolve_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if target.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise ConfigError(f'--dtype "{dtype}" is not a dtype. Choose: auto, {", ".join(DTYPES)}.')
    if any(count < 1 for count in tokens):
        raise ConfigError("--tokens: must be at least 1.")
    shapes = compressible_shapes(model) if model else None
    if model and not shapes:
        raise ConfigError(f"{model}: none of its layers has enough zeros. Prune it first.")
    return target, DTYPES[dtype], shapes


def _line(row: SpeedRow) -> str:
    return (
        f"{row.outputs:6} x {row.inputs:<6} M = {row.tokens:<5} {row.way:17} "
        f"{1e6 * row.seconds:10.1f} us  {row.dense:5.2f}x dense, {row.bandwidth:4.0%} of copy "
        f"bandwidth, {row.peak:4.0%} of peak"
    )


JSON_FILE, PLOT_FILE = "speed.json", "speed.svg"


def write_results(results: SpeedResults, environment: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``speed.json`` and ``speed.svg``, and return their paths.

    Args:
        results: The measurements.
        environment: Description of machine and software.
        folder: Output folder, created if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, **results.to_json()}
    write_atomically(folder / JSON_FILE, json.dumps(content, indent=1).encode() + b"\n")
    write_atomically(folder / PLOT_FILE, draw_plot(results).encode())
    return [folder / JSON_FILE, folder / PLOT_FILE]


def draw_plot(results: SpeedResults) -> str:
    """Return an SVG plot of speedup over dense against tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for way, speeds in mean_speedups(results.rows).items():
        axes.plot([*speeds], [*speeds.values()], marker="o", label=way)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="tokens at once (M)")
    axes.set(ylabel="speed, dense = 1", title=f"{results.device}, {results.dtype}")
    for axis in (axes.xaxis, axes.yaxis):  # powers of ten as plain numbers
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize="small")
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def mean_speedups(rows: list[SpeedRow]) -> dict[str, dict[int, float]]:
    """Return the geometric mean speedup over layers by implementation and tokens."""
    speedups: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.way != "dense":
            speedups.setdefault(row.way, {}).setdefault(row.tokens, []).append(row.dense)
    return {
        way: {
            tokens: statistics.geometric_mean(speeds)
            for tokens, speeds in sorted(by_tokens.items())
        }
        for way, by_tokens in speedups.items()
    }
