"""Speed and size with half of the heads and neurons removed."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import prunekit
from bench.structured.tasks import Task

PROMPT, WRITTEN, RUNS = 128, 64, 3
Row = dict[str, Any]


def speed(task: Task) -> Iterator[Row]:
    """Yield speed and size of the dense, gated and smaller model."""
    model = task.load()
    yield _speed(task, model, "dense")
    both = [prunekit.heads(model), prunekit.neurons(model)]
    for gates in both:
        gates.prune(gates.score("magnitude"), 0.5, scope="layer")
    yield _speed(task, model, "gated")
    stock = [gates.finalize().stock for gates in both]
    for gates in both:
        gates.detach()
    yield _speed(task, model, "removed") | {"stock": all(stock)}


def _speed(task: Task, model: PreTrainedModel, variant: str) -> Row:
    batch = {key: part[:1, :PROMPT] for key, part in task.evaluation[0].items() if part.ndim > 1}
    row: Row = {"variant": variant, "parameters": model.num_parameters()}
    row["read"] = batch["input_ids"].shape[1] / _seconds(lambda: model(**batch))
    if task.metric == "perplexity":
        ids = batch["input_ids"][:, :32]
        limits = {"min_new_tokens": WRITTEN, "max_new_tokens": WRITTEN, "do_sample": False}
        alone = _seconds(lambda: model(input_ids=ids))
        whole = _seconds(lambda: model.generate(ids, pad_token_id=0, **limits))  # pyright: ignore
        row["write"] = (WRITTEN - 1) / max(whole - alone, 1e-9)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        row["bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir())
    return row


def _seconds(call: Callable[[], object]) -> float:
    with torch.inference_mode():
        call()
        found = []
        for _ in range(RUNS):
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
    return statistics.median(found)
