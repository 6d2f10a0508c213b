"""Measures one model of a sweep: perplexity, speed, memory and generated text."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.config.evaluate_table import Evaluate
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.evaluation.generation import generate
from prunekit.evaluation.harness import harness_measures
from prunekit.evaluation.labelled import Rows, evaluate_rows
from prunekit.evaluation.perplexity import evaluate
from prunekit.models.devices import resolve_device
from prunekit.models.memory import limit_threads
from prunekit.reports.environment import peak_memory
from prunekit.runs.texts import tasks_of


def measure(
    folder: str, config: Config | StructuredConfig, tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield the facts of one model, once.

    Peak memory is that of the whole process, so call this in a process of its own.

    Args:
        folder: Checkpoint folder of the model.
        config: Its ``[evaluate]`` names the texts, ``model.device`` the device.
        tokens: Tokens generated for each prompt; 0 leaves out speed and text.
    """
    limit_threads(config.model.threads)
    texts, device = config.evaluate, config.model.device
    assert texts is not None
    facts: dict[str, Any] = {
        "evaluation": _evaluation(folder, texts, device),
        "bytes": sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")),
    }
    if tokens:
        place = resolve_device(device)
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place)
        generated = generate(folder, tokens, device=device)
        for name in ("prefill", "decode", "lexical_diversity", "repetition"):
            facts[name] = statistics.median(getattr(one, name) for one in generated)
        facts["texts"] = [[one.prompt, one.text] for one in generated]
    yield facts | peak_memory(resolve_device(device))


def _evaluation(folder: str, texts: Evaluate, device: str) -> list[dict[str, Any]]:
    """Return a model's measures on the data and tasks of [evaluate]."""
    if texts.task:
        rows = Rows(texts.task, texts.columns or {}, texts.length, texts.samples)
        found = evaluate_rows(folder, texts.data, rows, device)
    else:
        found = evaluate(
            folder, texts.data, texts.length, texts.windows, device, stride=texts.stride
        )
    if tasks := tasks_of(texts):
        found += harness_measures(open_checkpoint(Path(folder)), tasks, resolve_device(device))
    return found
