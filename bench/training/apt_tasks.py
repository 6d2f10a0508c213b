"""Tasks on which APT is compared: sentiment, sorting letters, stories."""

import csv
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.jobs.end_to_end import SHARED
from prunekit.data.tokens import calibration_tokens, evaluation_tokens
from prunekit.models import stock
from prunekit.structured.batches import mean_loss

Batch = dict[str, Tensor]
HELD_OUT = 512
"""Samples held out from training, to choose the best weights."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROLES = ["query", "key", "value", "output", "gate", "up", "down"]
"""All linears of a block of a Llama."""
STORY = 128
"""Tokens of a sample of stories."""


@dataclass(frozen=True)
class AptTask:
    """A model and its labelled data.

    Attributes:
        name: Name in the tables.
        model: Folder of the model.
        load: Returns the dense model in float32.
        train: Returns training batches of a size, shuffled by a seed.
        held_out: Returns the held-out batches.
        quality: Measures a model on the evaluation data.
        metric: Name of the quality.
        parameters: Fraction of the blocks' parameters to keep.
        batch: Samples of a training batch.
        settings: Further settings of APT.
    """

    name: str
    model: Path
    load: Callable[[], PreTrainedModel]
    train: Callable[[int, int], list[Batch]]
    held_out: Callable[[], list[Batch]]
    quality: Callable[[PreTrainedModel], float]
    metric: str
    parameters: float
    batch: int
    settings: dict[str, Any]


def tasks() -> dict[str, AptTask]:
    """Return the tasks whose files are here, by name; others are said aloud."""
    made = {"sst2": _sentiment, "sort": _sorting, "stories260K": _stories, "stories15M": _stories}
    found = {}
    for name, make in made.items():
        task = make(name)
        if task.model.is_dir():
            found[name] = task
        else:
            print(f"{task.model} is absent: {name} is not measured.")
    return found


def _sentiment(name: str) -> AptTask:
    """MiniLM-L6 on SST-2: accuracy on the whole dev.tsv."""
    folder, data = SHARED / "models/minilm-l6-sst2", SHARED / "data/sst2"

    def rows(file: str) -> list[tuple[str, int]]:
        with Path(data, file).open(encoding="utf-8") as lines:
            table = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            return [(text, int(label)) for text, label in [*table][1:]]

    def batches(chosen: list[tuple[str, int]], size: int) -> list[Batch]:
        tokenizer = stock.read_tokenizer(folder)
        found = []
        for start in range(0, len(chosen), size):
            texts, labels = zip(*chosen[start : start + size], strict=True)
            tokens = tokenizer([*texts], padding=True, truncation=True, return_tensors="pt")
            found.append({**tokens, "labels": torch.tensor(labels)})
        return found

    def train(size: int, seed: int) -> list[Batch]:
        chosen = rows("train_12k.tsv")[HELD_OUT:]
        random.Random(seed).shuffle(chosen)
        # Of similar lengths within 50 batches, so that little is padded.
        parts = [chosen[start : start + 50 * size] for start in range(0, len(chosen), 50 * size)]
        return batches([row for part in parts for row in sorted(part, key=_length)], size)

    @torch.inference_mode()
    def accuracy(model: PreTrainedModel) -> float:
        right = total = 0
        for batch in batches(sorted(rows("dev.tsv"), key=_length), 64):
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
            total += len(labels)
        return right / total

    return AptTask(
        name,
        folder,
        partial(_load, folder),
        train,
        lambda: batches(rows("train_12k.tsv")[:HELD_OUT], 64),
        accuracy,
        "accuracy",
        parameters=0.4,
        batch=32,
        settings={},
    )


def _length(row: tuple[str, int]) -> int:
    return len(row[0])


def _sorting(name: str) -> AptTask:
    """A T5 that sorts letters: exact match of 512 strings, greedy."""
    folder = SHARED / "models/t5-nano-sort"

    def strings(count: int, seed: object) -> list[str]:
        order = random.Random(str(seed))
        return ["".join(order.choices(LETTERS, k=order.randint(4, 16))) for _ in range(count)]

    def batches(chosen: list[str], size: int) -> list[Batch]:
        tokenizer = stock.read_tokenizer(folder)
        found = []
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            inputs = tokenizer(part, padding=True, return_tensors="pt")
            targets = ["".join(sorted(each)) for each in part]
            labels = tokenizer(targets, padding=True, return_tensors="pt")
            ignored = labels["attention_mask"] == 0
            found.append({**inputs, "labels": labels["input_ids"].masked_fill(ignored, -100)})
        return found

    @torch.inference_mode()
    def exact(model: PreTrainedModel) -> float:
        tokenizer = stock.read_tokenizer(folder)
        chosen, right = strings(512, "judged"), 0
        for start in range(0, len(chosen), 128):
            part = chosen[start : start + 128]
            inputs = tokenizer(part, padding=True, return_tensors="pt")
            made = model.generate(**inputs, max_new_tokens=20, do_sample=False, num_beams=1)  # pyright: ignore
            texts = tokenizer.batch_decode(made, skip_special_tokens=True)
            wanted = ["".join(sorted(each)) for each in part]
            right += sum(a.replace(" ", "") == b for a, b in zip(texts, wanted, strict=True))
        return right / len(chosen)

    return AptTask(
        name,
        folder,
        partial(_load, folder),
        lambda size, seed: batches(strings(64000, seed), size),
        lambda: batches(strings(HELD_OUT, "held out"), 128),
        exact,
        "exact match",
        parameters=0.6,
        batch=64,
        settings={"rate": 1e-3},
    )


def _stories(name: str) -> AptTask:
    """A Llama on stories: perplexity of held-out ones."""
    return stories(SHARED / "models" / name)


def stories(folder: Path, *, count: int = 4096, batch: int = 16) -> AptTask:
    """Return the task of a causal model on stories: perplexity of held-out ones.

    Args:
        folder: Folder of a model.
        count: Samples of training.
        batch: Samples of a training batch.
    """
    data = SHARED / "data/tinystories"

    def samples(count: int, seed: int) -> Tensor:
        tokenizer = stock.read_tokenizer(folder)
        return calibration_tokens(tokenizer, [str(data / "train.txt")], count, STORY, seed).ids

    def perplexity(model: PreTrainedModel) -> float:
        tokenizer = stock.read_tokenizer(folder)
        judged = evaluation_tokens(tokenizer, [str(data / "valid.txt")], STORY).ids
        return math.exp(mean_loss(model, [{"input_ids": part} for part in judged.split(16)]))

    return AptTask(
        folder.name,
        folder,
        partial(_load, folder),
        lambda size, seed: [{"input_ids": part} for part in samples(count, seed + 1).split(size)],
        lambda: [{"input_ids": part} for part in samples(128, 0).split(16)],
        perplexity,
        "perplexity",
        parameters=0.7,
        batch=batch,
        # Stories260K after 300 steps: perplexity 7.0; with query and value alone, 11.
        settings={"rate": 1e-3, "targets": ROLES},
    )


def _load(folder: Path) -> PreTrainedModel:
    return stock.open_model(folder, dtype=torch.float32).eval()
