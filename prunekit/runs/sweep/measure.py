"""What a sweep measures of each model: perplexity, speed, memory and the text that it writes."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from prunekit.config.run_config import Config, StructuredConfig
from prunekit.evaluation.generation import generate
from prunekit.evaluation.perplexity import evaluate
from prunekit.models.devices import device_of
from prunekit.reports.environment import peak_memory


def measure(
    folder: str, config: Config | StructuredConfig, tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield the facts of one model, once; the peak of memory is that of the process.

    Args:
        folder: The model.
        config: Says by which text it is judged, and where.
        tokens: What it writes to each prompt; 0 leaves speed and text out.
    """
    judged, device = config.evaluate, config.model.device
    assert judged is not None
    facts: dict[str, Any] = {
        "evaluation": evaluate(folder, judged.data, judged.length, judged.windows, device),
        "bytes": sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")),
    }
    if tokens:
        place = device_of(device)
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place)
        written = generate(folder, tokens, device=device)
        for name in ("prefill", "decode", "lexical_diversity", "repetition"):
            facts[name] = statistics.median(getattr(one, name) for one in written)
        facts["texts"] = [[one.prompt, one.text] for one in written]
    yield facts | peak_memory(device_of(device))
