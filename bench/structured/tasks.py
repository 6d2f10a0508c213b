"""Available models with their scoring and evaluation data."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase

import torch
from transformers import PreTrainedModel

import prunekit
from bench.jobs.end_to_end import SHARED, Job
from bench.quality.quality import all_jobs
from prunekit.data.tokens import calibration_tokens, evaluation_tokens
from prunekit.models import stock
from prunekit.structured.batches import IGNORED, Batch, mean_loss

SMOLLM2 = {"samples": 64, "length": 128, "windows": 12}
"""Text for a model of 135 M parameters, at about 150 tokens per second and thread."""
SMALL = {"windows": 40}
FEW = 512
"""Calibration tokens that are run once per unit, for leave-one-out."""


@dataclass(frozen=True)
class Task:
    """A model with its scoring and evaluation data.

    ``metric`` is perplexity, or accuracy: the fraction of samples whose every prediction is right.
    """

    name: str
    model: Path
    calibration: list[Batch]
    evaluation: list[Batch]
    metric: str

    def load(self) -> PreTrainedModel:
        """Return the dense model in float32."""
        return prunekit.load(self.model, torch.float32)

    @property
    def few(self) -> list[Batch]:
        """Return the part of the calibration that is run once per unit."""
        length = self.calibration[0]["input_ids"].shape[1]
        head = max(1, FEW // (length * len(self.calibration[0]["input_ids"])))
        return self.calibration[:head]

    @property
    def protocol(self) -> str:
        """Return the numbers of samples and tokens of each data set."""
        parts = [
            f"{sum(len(batch['input_ids']) for batch in data)} × {data[0]['input_ids'].shape[1]}"
            for data in (self.calibration, self.few, self.evaluation)
        ]
        return "tokens to calibrate {}, for leave-one-out {}, to judge {}".format(*parts)

    def quality(self, model: PreTrainedModel) -> float:
        """Return the metric of a model."""
        if self.metric == "perplexity":
            return math.exp(min(mean_loss(model, self.evaluation), 700))
        return _accuracy(model, self.evaluation)


def _accuracy(model: PreTrainedModel, batches: list[Batch]) -> float:
    right = total = 0
    for batch in batches:
        labels = batch["labels"]
        with torch.inference_mode():
            found = model(**batch).logits.argmax(-1)
        if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
            found, labels = found[:, :-1], labels[:, 1:]
        same = (found == labels) | (labels == IGNORED)
        right += int(same.view(len(labels), -1).all(1).sum())
        total += len(labels)
    return right / total


def tasks(wanted: list[str] | None) -> Iterator[Task]:
    """Yield every available model, with its task."""
    for job in all_jobs():
        if not wanted or job.name in wanted:
            yield _text(replace(job, **(SMOLLM2 if job.name.startswith("Smol") else SMALL)))
    labelled = {
        "minilm-l6-sst2": _sentences,
        "gpt2-nano-sort": _digits,
        "t5-nano-sort": _letters,
    }
    for name, make in labelled.items():
        if (SHARED / "models" / name).is_dir() and (not wanted or name in wanted):
            read, judged = make(SHARED / "models" / name)
            yield Task(name, SHARED / "models" / name, read, judged, "accuracy")


def _text(job: Job) -> Task:
    tokenizer, sources = stock.read_tokenizer(job.model), [str(job.calibration)]
    ids = calibration_tokens(tokenizer, sources, job.samples, job.length, 0).ids
    text = evaluation_tokens(tokenizer, [str(job.evaluation)], job.length, job.windows).ids
    read, judged = ([{"input_ids": p} for p in part.split(4)] for part in (ids, text))
    return Task(job.name, job.model, read, judged, "perplexity")


def _sentences(model: Path) -> tuple[list[Batch], list[Batch]]:
    """Return SST-2: 256 training samples, and the development set."""
    tokenizer = stock.read_tokenizer(model)

    def batches(file: str, count: int | None) -> list[Batch]:
        lines = (SHARED / "data/sst2" / file).read_text().splitlines()[1:][:count]
        rows = [line.split("\t") for line in lines]
        return [
            {
                **tokenizer([row[0] for row in part], padding=True, return_tensors="pt"),
                "labels": torch.tensor([int(row[1]) for row in part]),
            }
            for part in (rows[start : start + 32] for start in range(0, len(rows), 32))
        ]

    return batches("train_12k.tsv", 256), batches("dev.tsv", None)


def _digits(_: Path) -> tuple[list[Batch], list[Batch]]:
    """Return all inputs of the digit sorter, a third for calibration."""
    digits = torch.cartesian_prod(*[torch.arange(3)] * 6)
    whole = torch.cat([digits, digits.sort(1).values], 1)
    labels = whole.clone()
    labels[:, :6] = IGNORED
    batch = {"input_ids": whole[:, :-1], "labels": labels[:, :-1]}
    third = {name: part[::3] for name, part in batch.items()}
    return [third], [batch]


def _letters(model: Path) -> tuple[list[Batch], list[Batch]]:
    """Return random strings of 4 to 16 letters, labelled by sorting."""
    tokenizer, choice = stock.read_tokenizer(model), random.Random(0)
    words = ["".join(choice.choices(ascii_lowercase, k=choice.randint(4, 16))) for _ in range(800)]
    batches = []
    for start in range(0, len(words), 100):
        part = words[start : start + 100]
        batch = tokenizer(part, padding=True, return_tensors="pt")
        answers = tokenizer(["".join(sorted(word)) for word in part], padding=True)
        labels = torch.tensor(answers["input_ids"])
        padding = torch.tensor(answers["attention_mask"]) == 0
        batches.append({**batch, "labels": labels.masked_fill(padding, IGNORED)})
    return batches[:3], batches[3:]
