"""Accuracy, exact match and loss on labelled samples, block by block.

Exact match is that of greedy decoding: it writes a target, its end token included, if and only if
each of its tokens has the largest logit after the tokens before it. So one forward decides.

Shapes: B samples of a batch, T tokens of a target, C classes or token ids.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from prunekit.checkpoint.hub import checkpoint_folder
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.data.labelled import LabelledTask, Task
from prunekit.data.labelled_tokens import LabelledData
from prunekit.data.samples import Samples
from prunekit.data.sources import title
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import NumericsError
from prunekit.evaluation.perplexity import HEAD_TOKENS, Evaluator, run_blocks
from prunekit.models.devices import resolve_device
from prunekit.models.empty_model import max_tokens
from prunekit.models.memory import report_exhausted
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.models.sequential.pipeline import batch_tokens
from prunekit.models.sequential.weights import loaded_weights
from prunekit.models.vocabulary import load_tokenizer, output_heads

METRICS: dict[Task, tuple[str, str]] = {
    "classification": ("accuracy", "loss"),
    "seq2seq": ("exact match", "loss"),
}
"""Metrics of each task: the fraction of samples that are right, and the loss."""
PROTOCOLS: dict[Task, str] = {
    "classification": "accuracy: share of the samples whose class has the largest logit; loss: "
    "mean cross-entropy of a sample",
    "seq2seq": "exact match: share of the samples whose whole target greedy decoding writes; loss: "
    "mean cross-entropy of a target token",
}


def labelled_measures(
    evaluator: Evaluator, samples: Samples, task: Task, ranks: Ranks = SINGLE
) -> list[dict[str, Any]]:
    """Return the metrics of a task with their protocol.

    Args:
        evaluator: Evaluator of the checkpoint.
        samples: Labelled samples, the same on all ranks; each evaluates its share.
        task: The task of the samples.
        ranks: Processes that share the samples.

    Raises:
        NumericsError: The loss is NaN or inf.
    """
    share = ranks.shard(len(samples))
    own = _sums(evaluator, samples, share) if share.start < share.stop else (0, 0.0, 0)
    right, loss, predictions = map(sum, zip(*ranks.all_gather_object(own), strict=True))
    if not math.isfinite(loss):
        raise NumericsError(
            f"{evaluator.folder}: the loss of {type(evaluator.model).__name__} is {loss}. Its "
            f"weights are finite, so its hidden states overflow in {evaluator.weights.dtype}."
        )
    blocks = str(evaluator.weights.dtype).removeprefix("torch.")
    adapter = ", with the adapter that lies beside them" * bool(evaluator.weights.adapters)
    common = {
        "samples": len(samples),
        "protocol": f"{samples.description}, without padding; {PROTOCOLS[task]}; float32 logits, "
        f"{blocks} blocks{adapter}",
    }
    fraction, mean = METRICS[task]
    return [
        {"metric": fraction, "value": right / len(samples), "correct": right, **common},
        {"metric": mean, "value": loss / predictions, "predictions": predictions, **common},
    ]


@dataclass(frozen=True)
class Rows:
    """The labelled rows of each source that are evaluated.

    Attributes:
        task: Their task.
        columns: Names of columns that differ from the default ones, by column.
        length: Most tokens of a sample, capped at the model's maximum sequence length.
        samples: Rows from the start; None for all.
    """

    task: Task
    columns: Mapping[str, str]
    length: int
    samples: int | None = None


@report_exhausted()
def evaluate_rows(
    path: str, sources: Sequence[str], rows: Rows, device: str = "auto", ranks: Ranks = SINGLE
) -> list[dict[str, Any]]:
    """Return a checkpoint's measures on each source, with their protocol.

    Args:
        path: Folder or name of the checkpoint.
        sources: Sources of labelled rows as in a config.
        rows: The rows of each.
        device: Device as in a config.
        ranks: Ranks over which the samples are sharded.
    """
    ranks.require_same({"job": "evaluate", "model": path, "data": [*sources], **asdict(rows)})
    checkpoint = open_checkpoint(checkpoint_folder(path))
    ranks.require_same({"config.json": checkpoint.config})
    evaluator = Evaluator(checkpoint, ranks.local_device(resolve_device(device)))
    length = min(rows.length, max_tokens(evaluator.model))
    task = LabelledTask.of(rows.task, rows.columns, evaluator.model)
    tokenizer = load_tokenizer(checkpoint)
    results = []
    for source in sources:
        samples = LabelledData(task, tokenizer, [source], length).first(rows.samples)
        ranks.require_same({"samples": {source: samples.digest}})
        found = labelled_measures(evaluator, samples, rows.task, ranks)
        results += [{"data": title(source), **each} for each in found]
    return results


def _sums(evaluator: Evaluator, samples: Samples, share: slice) -> tuple[int, float, int]:
    """Return right samples, summed loss and predictions of a share."""
    device = evaluator.device
    batches = [
        {name: value.to(device) for name, value in batch.items()}
        for batch in samples.even_batches(batch_tokens(device), share)
    ]
    last = run_blocks(evaluator, batches)
    with loaded_weights(evaluator.weights, *output_heads(evaluator.model)):
        sums = [_batch_sums(last, number, batch) for number, batch in enumerate(batches)]
    right, loss, predictions = zip(*sums, strict=True)
    return sum(right), math.fsum(loss), sum(predictions)


def _batch_sums(
    last: LoadedBlock, number: int, batch: Mapping[str, Tensor]
) -> tuple[int, float, int]:
    """Return right samples, summed loss and predictions of a batch."""
    hidden, context, labels = last.hidden[number], last.contexts[number], batch["labels"]
    right, loss = 0, 0.0
    size = max(1, HEAD_TOKENS // labels.shape[1]) if labels.ndim == 2 else len(labels)
    for some in torch.arange(len(labels), device=labels.device).split(size):
        part = {name: value[some] for name, value in context.items()}
        logits = last.runner.head(hidden[some], part).float()
        right += _right(logits, labels[some])
        loss += float(
            cross_entropy(logits.flatten(0, -2), labels[some].flatten(), reduction="sum").double()
        )
    return right, loss, labels.numel()


def _right(logits: Float[Tensor, "B ... C"], labels: Int[Tensor, "B ..."]) -> int:
    """Return the number of samples whose labels are all predicted."""
    hits = logits.argmax(-1) == labels
    return int(hits.view(len(labels), -1).all(1).sum())
