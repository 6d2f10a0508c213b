"""Recovery training of a pruned model, with early stopping.

It trains a model with gated units, whose closed gates remain closed; a model without gates; or a
model with adapters of peft, which are then the only weights trained.

Shapes: N samples, T tokens.
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
from prunekit.structured.batches import (
    Batch,
    Data,
    eval_mode,
    losses,
    mean_loss,
    split_batches,
    to_batches,
)
from prunekit.structured.unit_gates import Gates

RECORD_INTERVAL = 10
"""Steps between two records of the training."""
FINAL_RATE = 0.1
"""Learning rate of the last step, as a fraction of the highest."""


@dataclass(frozen=True)
class TrainingStep:
    """Record of a training step.

    Attributes:
        step: Number of steps done.
        loss: Mean training loss per prediction of this step; None before the first.
        held_out: Mean held-out loss; None if it was not measured at this step.
        factors: Gate factor of each unit, by unit group; empty without gates.
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
    """Train a model with AdamW, then restore its best weights.

    Trained are all parameters that require a gradient. Dropout is off; the learning rate is that of
    :func:`learning_rate`. Yields a record every ten steps, and whenever the held-out loss is
    measured.

    Args:
        model: The model, trained in place. It may have gates, or adapters of peft.
        data: Token ids [N, T], or batches with the inputs of the loss, which are used as they are.
        held_out: Likewise; the best weights are those with the lowest loss on it.
        settings: Learning rate, steps and early stopping.
        gates: Gates of the model. Closed units are not updated; gate values that require a gradient
            are trained too.

    Raises:
        NumericsError: The loss is not finite.
    """
    settings = settings or Train()
    train = _in_batches(data, model, settings.batch)
    validation = _in_batches(held_out, model, settings.batch)
    weights = _trained(model, gates)
    optimizer = torch.optim.AdamW(weights, settings.rate)
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        best = BestCheckpoint(weights, mean_loss(model, validation))
        yield TrainingStep(0, None, best.loss, _factors(gates))
        for each in gates:
            stack.enter_context(each.hold(optimizer))
        for step, loss in _steps(model, train, optimizer, settings):
            measured = None
            if step % settings.every == 0 or step == settings.steps:
                measured = mean_loss(model, validation)
                best.update(measured)
            if measured is not None or step % RECORD_INTERVAL == 0:
                yield TrainingStep(step, loss, measured, _factors(gates))
            if best.stale == settings.patience:
                break
    best.restore()


def _trained(model: PreTrainedModel, gates: Sequence[Gates]) -> list[Tensor]:
    values = (gate.value for each in gates for gate in each.gates.values())
    return [each for each in (*model.parameters(), *values) if each.requires_grad]


def _steps(
    model: PreTrainedModel,
    train: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    settings: Train,
) -> Iterator[tuple[int, float]]:
    """Run training steps, yielding the number and loss of each.

    Batches are shuffled in each epoch.
    """
    order = random.Random(settings.seed)
    queue: list[Batch] = []
    for step in range(1, settings.steps + 1):
        queue = queue or order.sample(train, len(train))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        loss = _step(model, queue.pop(), optimizer)
        if not math.isfinite(loss):
            raise NumericsError(f"train: the loss is {loss} at step {step}. Lower train.rate.")
        yield step, loss


class BestCheckpoint:
    """The weights whose held-out loss was the lowest so far.

    Attributes:
        loss: The lowest held-out loss.
        stale: Measurements since then.
    """

    def __init__(self, weights: Sequence[Tensor], loss: float) -> None:
        self.loss, self.stale = loss, 0
        self._weights = weights
        self._copies = [each.detach().clone() for each in weights]

    def update(self, loss: float) -> None:
        """Store the current weights if their loss is the lowest."""
        self.stale += 1
        if loss < self.loss:
            self.loss, self.stale = loss, 0
            _copy(self._weights, self._copies)

    def restore(self) -> None:
        """Copy the stored weights back."""
        _copy(self._copies, self._weights)


def learning_rate(step: int, settings: Train) -> float:
    """Return the learning rate of a step, counted from 1.

    It rises linearly over a tenth of the steps, at most 100, and then falls along a cosine.
    """
    warmup = max(1, min(100, settings.steps // 10))
    if step <= warmup:
        return settings.rate * step / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return settings.rate * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def recovered_fraction(base: float, post: float, final: float) -> float | None:
    """Return the fraction of the loss increase that training recovered.

    1 is all of it; a negative value is a further increase; None if there was no increase.

    Args:
        base: Loss of the dense model.
        post: Loss after pruning.
        final: Loss after training.
    """
    return (post - final) / (post - base) if post > base else None


def summarize(base: float, steps: Sequence[TrainingStep]) -> dict[str, Any]:
    """Return the training section of a report.

    Args:
        base: Held-out loss of the dense model.
        steps: The records that :func:`recover` yielded.
    """
    held_out = [step.held_out for step in steps if step.held_out is not None]
    return {
        "base": base,
        "post": held_out[0],
        "final": min(held_out),
        "recovery": recovered_fraction(base, held_out[0], min(held_out)),
        "steps": steps[-1].step,
        "history": [asdict(step) for step in steps],
    }


def _in_batches(data: Data, model: PreTrainedModel, size: int) -> list[Batch]:
    return to_batches(split_batches(data, model, size), model)


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
    for value, destination in zip(source, target, strict=True):
        destination.copy_(value)
