"""Training that wins back what a model lost with its units, and stops when it stops helping.

Works on a model whose units are gated, which it leaves closed; on one without them; and on one that
peft has given adapters, which are then all that is trained.

Shapes: U units of a place.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.config.structured_table import Train
from prunekit.errors import NumericsError
from prunekit.structured.batches import Batch, Data, losses, mean_loss, still
from prunekit.structured.batches import batches as as_batches
from prunekit.structured.unit_gates import Gates

TRACKED = 10
"""Steps between two records of what the gates let through."""
LEAST_RATE = 0.1
"""What is left of the learning rate at the last step."""


@dataclass(frozen=True)
class TrainingStep:
    """Where a training is.

    Attributes:
        step: Steps done so far.
        loss: Mean loss of the predictions of the last step; None before the first.
        held_out: That of the held-out text; None where it was not looked at.
        factors: What each unit is multiplied by, by place; empty without gates.
    """

    step: int
    loss: float | None
    held_out: float | None
    factors: dict[str, list[float]]


def recover(
    model: PreTrainedModel,
    data: Data,
    held_out: Data,
    settings: Train | None = None,
    gates: Sequence[Gates] = (),
) -> Iterator[TrainingStep]:
    """Train what of a model wants a gradient, and at the end take the weights that were best.

    AdamW, without dropout; the learning rate rises for a tenth of the steps, for 100 at most, and
    then falls along a cosine. Yields where it is every ten steps, and whenever it looks at held-out
    text.

    Args:
        model: It is changed in place; its gates, if any, are named below.
        data: Token ids [N, T], or batches with what the loss needs, which are taken as they are.
        held_out: The same; what the loss is judged by.
        settings: Rate, steps, and when to stop.
        gates: Closed units of these get no update; factors that want a gradient are trained too.

    Raises:
        NumericsError: The loss is not finite.
    """
    settings = settings or Train()
    train = _in_batches(data, model, settings.batch)
    judged = _in_batches(held_out, model, settings.batch)
    weights: list[Tensor] = [each for each in model.parameters() if each.requires_grad]
    weights += [
        gate.value for each in gates for gate in each.gates.values() if gate.value.requires_grad
    ]
    optimizer = torch.optim.AdamW(weights, settings.rate)
    order = random.Random(settings.seed)
    with ExitStack() as held:
        held.enter_context(still(model))
        best = BestCheckpoint(weights, mean_loss(model, judged))
        yield TrainingStep(0, None, best.loss, _factors(gates))
        for each in gates:
            held.enter_context(each.hold(optimizer))
        queue: list[Batch] = []
        for step in range(1, settings.steps + 1):
            queue = queue or order.sample(train, len(train))
            for group in optimizer.param_groups:
                group["lr"] = rate(step, settings)
            loss = _step(model, queue.pop(), optimizer)
            if not math.isfinite(loss):
                raise NumericsError(f"train: the loss is {loss} at step {step}. Lower train.rate.")
            found = None
            if step % settings.every == 0 or step == settings.steps:
                found = mean_loss(model, judged)
                best.compare(found)
            if found is not None or step % TRACKED == 0:
                yield TrainingStep(step, loss, found, _factors(gates))
            if best.waited == settings.patience:
                break
    best.take()


class BestCheckpoint:
    """The weights whose held-out loss was the lowest so far.

    Attributes:
        loss: That loss.
        waited: How often it has been compared since with one that was no lower.
    """

    def __init__(self, weights: Sequence[Tensor], loss: float) -> None:
        self.loss, self.waited = loss, 0
        self._weights = weights
        self._copies = [each.detach().clone() for each in weights]

    def compare(self, loss: float) -> None:
        """Remember the weights as they are if their loss is the lowest."""
        self.waited += 1
        if loss < self.loss:
            self.loss, self.waited = loss, 0
            _copy(self._weights, self._copies)

    def take(self) -> None:
        """Put them back."""
        _copy(self._copies, self._weights)


def rate(step: int, settings: Train) -> float:
    """Return the learning rate of a step, of which the first is 1."""
    rising = max(1, min(100, settings.steps // 10))
    if step <= rising:
        return settings.rate * step / rising
    part = (step - rising) / max(1, settings.steps - rising)
    falling = (1 + math.cos(math.pi * part)) / 2
    return settings.rate * (LEAST_RATE + (1 - LEAST_RATE) * falling)


def recovered(base: float, post: float, final: float) -> float | None:
    """Return what part of a lost loss was won back: 1 all of it, less than 0 if it got worse.

    Args:
        base: The loss of the dense model.
        post: That after units went; None is returned if it is no higher, so that nothing was lost.
        final: That after the training.
    """
    return (post - final) / (post - base) if post > base else None


def summary(base: float, moments: Sequence[TrainingStep]) -> dict[str, Any]:
    """Return what a report says of a training; ``base`` is the held-out loss of the dense model."""
    looked = [moment.held_out for moment in moments if moment.held_out is not None]
    return {
        "base": base,
        "post": looked[0],
        "final": min(looked),
        "recovery": recovered(base, looked[0], min(looked)),
        "steps": moments[-1].step,
        "history": [asdict(moment) for moment in moments],
    }


def _in_batches(data: Data, model: PreTrainedModel, size: int) -> list[Batch]:
    if isinstance(data, Tensor):
        return as_batches([{"input_ids": part} for part in data.split(size)], model)
    return as_batches(data, model)


def _step(model: PreTrainedModel, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    loss, predictions = losses(model, batch)
    mean = loss.sum() / predictions.sum().clamp_min(1)
    optimizer.zero_grad()
    mean.backward()
    optimizer.step()
    return float(mean.detach())


def _factors(gates: Sequence[Gates]) -> dict[str, list[float]]:
    return {
        name: gate.factor.detach().tolist() for each in gates for name, gate in each.gates.items()
    }


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for kept, weight in zip(source, target, strict=True):
        weight.copy_(kept)
