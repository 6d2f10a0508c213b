"""Batches of labelled files, for pruning and training in Python."""

from collections.abc import Mapping
from os import PathLike, fspath

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit.data.labelled import LabelledTask, Task
from prunekit.data.labelled_tokens import LabelledData
from prunekit.errors import ConfigError
from prunekit.models.empty_model import max_tokens
from prunekit.structured.batches import Batch
from prunekit.structured.block_batches import to_device


def labelled_batches(  # noqa: PLR0913  independent options
    path: str | PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    task: Task = "classification",
    *,
    columns: Mapping[str, str] | None = None,
    batch: int = 32,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
) -> list[Batch]:
    """Return a labelled file as padded batches with masks and labels.

    Samples of similar length share a batch, so that little is padding; the batches are in random
    order. They are data for ``prunekit.prune``, ``prunekit.heads(model).score`` and training.

    Args:
        path: A .tsv, .csv, .jsonl, .jsonl.gz or .parquet file, or hub:NAME:SPLIT.
        tokenizer: Tokenizer of the model.
        model: The model that reads the batches; they are on its device.
        task: "classification" (columns text or sentence, label, perhaps pair) or "seq2seq" (input,
            target).
        columns: Names of columns that differ from these, as ``{"label": "gold"}``.
        batch: Samples of a batch.
        samples: Number of rows, chosen at random; None: all.
        length: Most tokens of a text, capped at those that model and tokenizer take.
        seed: Seed of the choice and of the order.

    Raises:
        ConfigError: The model is of another kind, the file cannot be read, a column is missing or a
            label is no class, or a number is not above 0.
    """
    for name, number in (("batch", batch), ("samples", samples), ("length", length)):
        if number is not None and number < 1:
            raise ConfigError(f"{name}: {number} is not possible: at least 1.")
    longest = max_tokens(model)
    capped = longest if length is None else min(length, longest)
    rows = LabelledData(LabelledTask.of(task, columns, model), tokenizer, [fspath(path)], capped)
    return [to_device(each, model.device) for each in rows.sample(samples, seed).batches_of(batch)]
