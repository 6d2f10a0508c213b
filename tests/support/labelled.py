"""Tiny labelled files, and the tasks of tiny models that read them."""

import csv
from pathlib import Path

from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from prunekit.data.labelled import LabelledTask, Task
from prunekit.data.labelled_tokens import LabelledData
from tests.support.architectures import tiny
from tests.support.checkpoints import tokenizer

SENTENCES = [
    ("a fine film", 1), ("dull", 0), ("it is long and it is slow", 0), ("good", 1), ("bad", 0),
    ("what a pleasure to see this again", 1), ("never again", 0), ("one of the best", 1),
]  # fmt: skip
WORDS = [("cab", "abc"), ("x", "x"), ("hello", "ehllo"), ("ba", "ab"), ("sorting", "ginorst")]


def write_rows(file: Path, *rows: tuple[object, ...]) -> Path:
    """Write rows, the first of which names the columns, as .tsv or .csv."""
    delimiter = "\t" if file.suffix == ".tsv" else ","
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened, delimiter=delimiter).writerows(rows)
    return file


def sentences(folder: Path) -> Path:
    """Write the sentences with their classes."""
    return write_rows(folder / "sentences.tsv", ("sentence", "label"), *SENTENCES)


def words(folder: Path) -> Path:
    """Write the words with their letters in order."""
    return write_rows(folder / "words.tsv", ("input", "target"), *WORDS)


def classifier(model_type: str = "bert", **entries: object) -> PreTrainedModel:
    """Return a tiny classifier of two classes."""
    return tiny(model_type, AutoModelForSequenceClassification, **entries)


def labelled(model: PreTrainedModel, file: Path, task: Task, length: int = 64) -> LabelledData:
    """Return the rows of a file as a model reads them."""
    return LabelledData(LabelledTask.of(task, None, model), tokenizer(), [str(file)], length)
