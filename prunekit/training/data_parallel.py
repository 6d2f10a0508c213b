"""A training step whose batch is shared by several processes.

Each rank has the whole model and all data, and runs its share of every batch. A loss is divided by
the predictions of the whole batch, so that the sums over ranks are those of one process.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from prunekit.distributed.ranks import Ranks
from prunekit.distributed.weights import differing, sum_over_ranks
from prunekit.errors import NumericsError
from prunekit.structured.batches import Batch, losses, predicted_labels
from prunekit.structured.token_ids import IGNORED


def training_step(
    model: PreTrainedModel,
    batch: Batch,
    optimizer: Optimizer,
    ranks: Ranks,
) -> float:
    """Do an optimizer step; return the mean loss per prediction.

    Args:
        model: The model, the same on all ranks.
        batch: The whole batch, the same on all ranks.
        optimizer: Of the weights that are trained.
        ranks: The processes that share the batch.
    """
    predictions = (predicted_labels(model, batch) != IGNORED).sum().clamp_min(1)
    part = ranks.shard(len(batch["input_ids"]))
    has_samples = part.start < part.stop
    # A rank without samples runs one for nothing: hooks of the forward then run on all ranks.
    loss, _ = losses(model, _samples(batch, part if has_samples else slice(1)))
    mean = loss.sum() / predictions
    if not has_samples:
        mean = mean * 0
    optimizer.zero_grad()
    mean.backward()
    total = _sum_gradients(optimizer, mean.detach(), ranks)
    optimizer.step()
    return total


def _sum_gradients(optimizer: Optimizer, loss: Tensor, ranks: Ranks) -> float:
    """Sum the gradients over ranks, in place, and the losses.

    A weight that has a gradient on no rank has none afterwards.
    """
    if not ranks.is_distributed:
        return float(loss)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    present = [float(weight.grad is not None) for weight in weights]
    numbers = torch.tensor([float(loss), *present], device=loss.device)
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    sum_over_ranks([numbers, *(weight.grad for weight in weights)], ranks, "gradients")
    total, *present = numbers.tolist()
    for weight, count in zip(weights, present, strict=True):
        if not count:
            weight.grad = None
    return total


def own_shares(batches: Sequence[Batch], ranks: Ranks) -> list[Batch]:
    """Return this rank's samples of each batch that has any."""
    parts = [(batch, ranks.shard(len(batch["input_ids"]))) for batch in batches]
    return [_samples(batch, part) for batch, part in parts if part.start < part.stop]


def _samples(batch: Batch, part: slice) -> Batch:
    return {name: value[part] if value.ndim else value for name, value in batch.items()}


def check_equal(
    weights: Mapping[str, Tensor], data: Mapping[str, Sequence[Batch]], ranks: Ranks, step: int
) -> None:
    """Compare weights and data over ranks.

    Args:
        weights: Weights by name.
        data: Batches by the name of the argument.
        ranks: The ranks that compare theirs.
        step: Number of the training step, for the message.

    Raises:
        NumericsError: They are not the same bits on all ranks; the message names those that differ.
    """
    named = {
        f"{argument}[{number}].{name}": value
        for argument, batches in data.items()
        for number, batch in enumerate(batches)
        for name, value in batch.items()
    }
    if differences := differing({**named, **weights}, ranks):
        raise NumericsError(
            "\n  ".join([f"train: after step {step} ranks differ in", *differences])
            + "\nPass the same model and data on all ranks, and use GPUs of one kind."
        )
