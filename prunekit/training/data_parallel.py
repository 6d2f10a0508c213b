"""A training step whose batch is shared by several processes.

Each rank has all data and the whole model, or a part of each weight, and runs its share of every
batch. A loss is divided by the predictions of the whole batch, so that the sums over ranks are
those of one process.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from prunekit.distributed.ranks import Ranks
from prunekit.distributed.weights import differing, sum_over_ranks
from prunekit.errors import NumericsError
from prunekit.models.in_memory import is_distributed
from prunekit.structured.batches import Batch, losses, predicted_labels
from prunekit.structured.token_ids import IGNORED


@dataclass(frozen=True)
class Share:
    """A rank's share of a batch.

    Attributes:
        whole: The whole batch, the same on all ranks.
        samples: The samples of this rank.
        predictions: Number of predictions of the whole batch, at least 1.
        counts: False on a rank without samples, which runs one for nothing: hooks of the forward
            then run on all ranks. What it returns is multiplied by 0.
        ranks: The processes that share the batch.
    """

    whole: Batch
    samples: Batch
    predictions: Tensor
    counts: bool
    ranks: Ranks


class Losses(NamedTuple):
    """Losses of a share, which add up over ranks.

    Attributes:
        objective: The scalar that is differentiated.
        loss: Mean fine-tuning loss per prediction.
        parts: Further losses that are reported, by name.
    """

    objective: Tensor
    loss: Tensor
    parts: Mapping[str, Tensor] = {}


class Objective(Protocol):
    """Loss that a training step differentiates, such as a ``Distiller``."""

    def __call__(self, model: PreTrainedModel, share: Share) -> Losses:
        """Run the model on a share of a batch; return its losses."""
        ...


class StepLosses(NamedTuple):
    """Losses of a training step, of all ranks.

    Attributes:
        loss: Mean fine-tuning loss per prediction.
        parts: Further losses of the objective, by name; empty for the fine-tuning loss alone.
    """

    loss: float
    parts: Mapping[str, float] = {}

    def check_finite(self, step: int, table: str = "train") -> None:
        """Refuse losses that are not finite.

        Args:
            step: Number of the training step, for the message.
            table: Table of the config with the learning rate.

        Raises:
            NumericsError: One is not; the message names it and the step.
        """
        parts = {f"{name} loss": value for name, value in self.parts.items()}
        for name, value in {"loss": self.loss, **parts}.items():
            if not math.isfinite(value):
                raise NumericsError(
                    f"{table}: the {name} is {value} at step {step}. Lower {table}.rate."
                )


def fine_tuning_loss(model: PreTrainedModel, share: Share) -> Losses:
    """Return the mean loss per prediction."""
    loss, _ = losses(model, share.samples)
    mean = loss.sum() / share.predictions
    return Losses(mean, mean)


def training_step(
    model: PreTrainedModel,
    batch: Batch,
    optimizer: Optimizer,
    ranks: Ranks,
    objective: Objective = fine_tuning_loss,
    check: Callable[[StepLosses], None] = lambda _: None,
) -> StepLosses:
    """Do an optimizer step; return its losses.

    Args:
        model: The model, the same on all ranks.
        batch: The whole batch, the same on all ranks.
        optimizer: Of the weights that are trained.
        ranks: The processes that share the batch.
        objective: The loss that is differentiated.
        check: Called with the losses before any weight changes; raises to refuse them.
    """
    predictions = (predicted_labels(model, batch) != IGNORED).sum().clamp_min(1)
    part = ranks.shard(len(batch["input_ids"]))
    counts = part.start < part.stop
    samples = _samples(batch, part if counts else slice(1))
    found = objective(model, Share(batch, samples, predictions, counts, ranks))
    if not counts:
        parts = {name: part * 0 for name, part in found.parts.items()}
        found = Losses(found.objective * 0, found.loss * 0, parts)
    optimizer.zero_grad()
    found.objective.backward()
    reported = [found.loss.detach(), *(part.detach() for part in found.parts.values())]
    loss, *parts = _sum_gradients(optimizer, reported, ranks)
    summed = StepLosses(loss, dict(zip(found.parts, parts, strict=True)))
    check(summed)
    optimizer.step()
    return summed


def _sum_gradients(optimizer: Optimizer, reported: Sequence[Tensor], ranks: Ranks) -> list[float]:
    """Sum the gradients over ranks, in place; return the summed losses.

    A weight that has a gradient on no rank has none afterwards. Gradients of sharded weights are
    sums already.
    """
    if not ranks.is_distributed:
        return [float(loss) for loss in reported]
    trained = (weight for group in optimizer.param_groups for weight in group["params"])
    weights = [weight for weight in trained if not is_distributed(weight)]
    present = [float(weight.grad is not None) for weight in weights]
    numbers = torch.tensor([*map(float, reported), *present], device=reported[0].device)
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    sum_over_ranks([numbers, *(weight.grad for weight in weights)], ranks, "gradients")
    totals = numbers.tolist()
    for weight, count in zip(weights, totals[len(reported) :], strict=True):
        if not count:
            weight.grad = None
    return totals[: len(reported)]


def own_shares(batches: Sequence[Batch], ranks: Ranks) -> list[Batch]:
    """Return this rank's samples of each batch that has any."""
    parts = [(batch, ranks.shard(len(batch["input_ids"]))) for batch in batches]
    return [_samples(batch, part) for batch, part in parts if part.start < part.stop]


def equal_shares(batches: Sequence[Batch], ranks: Ranks) -> list[Batch]:
    """Return this rank's samples of each batch, or one that predicts nothing."""
    parts = [(batch, ranks.shard(len(batch["input_ids"]))) for batch in batches]
    return [
        _samples(batch, part)
        if part.start < part.stop
        else _without_predictions(_samples(batch, slice(1)))
        for batch, part in parts
    ]


def _without_predictions(batch: Batch) -> Batch:
    """Return a batch whose labels are all ignored."""
    like = batch.get("labels", batch["input_ids"])
    return {**batch, "labels": torch.full_like(like, IGNORED)}


def _samples(batch: Batch, part: slice) -> Batch:
    return {name: value[part] if value.ndim else value for name, value in batch.items()}


def check_equal(
    weights: Mapping[str, Tensor], data: Mapping[str, Sequence[Batch]], ranks: Ranks, step: int
) -> None:
    """Compare weights and data over ranks.

    Args:
        weights: Weights by name; sharded ones are not compared, as no rank has another's part.
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
    named |= {name: each for name, each in weights.items() if not is_distributed(each)}
    if differences := differing(named, ranks):
        raise NumericsError(
            "\n  ".join([f"train: after step {step} ranks differ in", *differences])
            + "\nPass the same model and data on all ranks, and use GPUs of one kind."
        )
