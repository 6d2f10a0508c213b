"""The command ``prunekit bench``: measures, writes, and says what came of it, line by line."""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from prunekit.checkpoint.atomic import write_atomically
from prunekit.errors import ConfigError
from prunekit.formatting import number, size
from prunekit.inference.layer_speed import Measured, Row, measure
from prunekit.inference.model_speed import compare, shapes_of
from prunekit.models.devices import device_of
from prunekit.reports.environment import environment

PROMPT, NEW = 512, 64
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def bench(
    model: str | None, output: Path, tokens: Sequence[int], device: str, dtype: str
) -> Iterator[str]:
    """Yield lines as things are measured; the last ones are the verdicts.

    Raises:
        ConfigError: A type, a number of tokens or the model cannot be meant.
    """
    place, kind, shapes = _checked(model, tokens, device, dtype)
    found: Measured | None = None
    for row in measure(place, kind, shapes, tokens or None):
        if isinstance(row, Measured):
            found = row
            continue
        yield _line(row)
    assert found is not None
    if model:
        found.models = compare(model, place, PROMPT, NEW)
        for entry in found.models:
            yield (
                f"{entry['layers']:12} prefill {number(entry['prefill_tokens_per_second'])} "
                f"tokens/s, decode {number(entry['decode_tokens_per_second'])} tokens/s, "
                f"{size(entry['resident_bytes'])} of weights"
            )
    for file in write(found, environment(place), output):
        yield f"written: {file}"
    yield from found.dump()["verdicts"]


def _checked(
    model: str | None, tokens: Sequence[int], device: str, dtype: str
) -> tuple[torch.device, torch.dtype, list[tuple[int, int]] | None]:
    place = device_of(device)
    if dtype == "auto":
        dtype = "bfloat16" if place.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise ConfigError(f'--dtype "{dtype}" is not one. Choose: auto, {", ".join(DTYPES)}.')
    if any(count < 1 for count in tokens):
        raise ConfigError("--tokens: at least 1.")
    shapes = shapes_of(model) if model else None
    if model and not shapes:
        raise ConfigError(f"{model}: none of its layers has enough zeros. Prune it first.")
    return place, DTYPES[dtype], shapes


def _line(row: Row) -> str:
    return (
        f"{row.outputs:6} x {row.inputs:<6} M = {row.tokens:<5} {row.way:17} "
        f"{1e6 * row.seconds:10.1f} us  {row.dense:5.2f}x dense, {row.bandwidth:4.0%} of copy "
        f"bandwidth, {row.peak:4.0%} of peak"
    )


JSON, PLOT = "speed.json", "speed.svg"


def write(found: Measured, environment: dict[str, Any], folder: Path) -> list[Path]:
    """Write both files, and return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, **found.dump()}
    write_atomically(folder / JSON, json.dumps(content, indent=1).encode() + b"\n")
    write_atomically(folder / PLOT, plot(found).encode())
    return [folder / JSON, folder / PLOT]


def plot(found: Measured) -> str:
    """Return speed over dense against tokens, one line for each way, as SVG."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for way, speeds in speeds_over_dense(found.rows).items():
        axes.plot([*speeds], [*speeds.values()], marker="o", label=way)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="tokens at once (M)")
    axes.set(ylabel="speed, dense = 1", title=f"{found.device}, {found.dtype}")
    axes.legend(fontsize="small")
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    return stream.getvalue()


def speeds_over_dense(rows: list[Row]) -> dict[str, dict[int, float]]:
    """Return, for each way but dense, the geometric mean over layers for each number of tokens."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.way != "dense":
            found.setdefault(row.way, {}).setdefault(row.tokens, []).append(row.dense)
    return {
        way: {tokens: statistics.geometric_mean(speeds) for tokens, speeds in sorted(by_m.items())}
        for way, by_m in found.items()
    }
