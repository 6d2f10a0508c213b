"""The command ``prunekit bench``: measures, writes, and says what came of it, line by line."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from prunekit.errors import ConfigError
from prunekit.evaluation import device_of
from prunekit.model_speed import compare, shapes_of
from prunekit.result import environment
from prunekit.speed import Measured, Row, measure
from prunekit.speed_report import write
from prunekit.units import number, size

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
