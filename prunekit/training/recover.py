"""Recovery training of a pruned model, with early stopping.

It trains a model with gated units, whose closed gates remain closed; a model without gates; or a
model with adapters of peft, which are then the only weights trained. Several processes each run
their share of every batch.

Shapes: N samples, T tokens.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from prunekit.config.train_table import Train
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError, NumericsError
from prunekit.structured.batches import (
    Batch,
    Data,
    eval_mode,
    mean_loss,
    split_batches,
    to_batches,
)
from prunekit.structured.unit_gates import Gates
from prunekit.training.best_checkpoint import BestCheckpoint
from prunekit.training.data_parallel import check_equal, own_shares, training_step

RECORD_INTERVAL = 10
"""Steps between two records of the training."""
FINAL_RATE = 0.1
"""Learning rate of the last step, as a fraction of the highest."""


class Pruning(Protocol):
    """Pruning in force during training, such as a :class:`GradualPruner`."""

    @property
    def sparsity(self) -> float:
        """The sparsity that is asked for now."""
        ...

    @property
    def achieved(self) -> float:
        """The sparsity counted in the tensors."""
        ...

    @property
    def done(self) -> bool:
        """Whether the schedule has ended, and its sparsity is the one counted."""
        ...


During = Callable[[Optimizer], AbstractContextManager[Pruning | None]]
"""Returns a context for the training by an optimizer."""


@dataclass(frozen=True)
class TrainingStep:
    """Record of a training step.

    Attributes:
        step: Number of steps done.
        loss: Mean training loss per prediction of this step; None before the first.
        held_out: Mean held-out loss; None if it was not measured at this step.
        factors: Gate factor of each unit, by unit group; empty without gates.
        rate: Learning rate of this step; None before the first.
        sparsity: Sparsity that the pruning in force asks for; None without one.
        achieved: Sparsity that was counted; None without pruning in force.
        done: Whether no pruning is to come, so that these weights could be the best.
    """

    step: int
    loss: float | None
    held_out: float | None
    factors: dict[str, list[float]]
    rate: float | None = None
    sparsity: float | None = None
    achieved: float | None = None
    done: bool = True


def recover(  # noqa: PLR0913  independent options
    model: PreTrainedModel,
    data: Data,
    held_out: Data,
    settings: Train | None = None,
    gates: Sequence[Gates] = (),
    *,
    ranks: Ranks = SINGLE,
    during: During | None = None,
) -> Iterator[TrainingStep]:
    """Train a model with AdamW, then restore its best weights.

    Trained is all that requires a gradient. Dropout is off; for the learning rate see
    :func:`learning_rate`. Weights from before the end of pruning are never the best.

    Args:
        model: The model, trained in place. It may have gates, or adapters of peft.
        data: Token ids [N, T], or batches with the inputs of the loss, used as they are.
        held_out: Likewise; the best weights have the lowest loss on it.
        settings: Learning rate, steps and early stopping.
        gates: Gates of the model; closed units are not updated, values with gradients are.
        ranks: Processes with the same model and data; each runs its share of every batch.
        during: Called with the optimizer; the context that it returns is in force until the end.

    Raises:
        ConfigError: The steps ended before the pruning in force was done.
        NumericsError: The loss is not finite, or ranks differ in weights or data.
    """
    settings = settings or Train()
    train = _in_batches(data, model, settings.batch)
    validation = _in_batches(held_out, model, settings.batch)
    optimizer = torch.optim.AdamW([*_trained(model, gates).values()], settings.rate)
    every = {**dict(model.named_parameters()), **_trained(model, gates)}
    check_equal(every, {"data": train, "held_out": validation}, ranks, 0)
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for each in gates:
            stack.enter_context(each.hold(optimizer))
        pruning = stack.enter_context(during(optimizer)) if during else None
        own = own_shares(validation, ranks)
        measure = _Measure(model, own, settings, gates, pruning, ranks)
        yield measure.record(0, is_measured=True)
        for step, loss in _steps(model, train, optimizer, settings, ranks):
            is_measured = step % settings.every == 0 or step == settings.steps
            if is_measured or step % RECORD_INTERVAL == 0:
                yield measure.record(step, loss, is_measured=is_measured)
            if measure.best.stale == settings.patience:
                break
        measure.restore_best()


def _trained(model: PreTrainedModel, gates: Sequence[Gates]) -> dict[str, Tensor]:
    """Return the parameters and gate values that are trained, by name."""
    values = ((f"gate {name}", gate.value) for each in gates for name, gate in each.gates.items())
    named = (*model.named_parameters(), *values)
    return {name: each for name, each in named if each.requires_grad}


def _steps(
    model: PreTrainedModel,
    train: Sequence[Batch],
    optimizer: Optimizer,
    settings: Train,
    ranks: Ranks,
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
        loss = training_step(model, queue.pop(), optimizer, ranks)
        if not math.isfinite(loss):
            raise NumericsError(f"train: the loss is {loss} at step {step}. Lower train.rate.")
        yield step, loss


@dataclass
class _Measure:
    """Measures a model in training, and stores the best weights.

    Attributes:
        model: The model.
        validation: Held-out batches of this rank.
        settings: Settings of the training.
        gates: Gates whose factors are recorded.
        pruning: The pruning in force.
        ranks: Processes with the same weights.
        best: The best weights so far.
    """

    model: PreTrainedModel
    validation: Sequence[Batch]
    settings: Train
    gates: Sequence[Gates]
    pruning: Pruning | None
    ranks: Ranks

    def __post_init__(self) -> None:
        # Pruning may replace the weights, so that they are listed when they are stored.
        self.best = BestCheckpoint(lambda: [*_trained(self.model, self.gates).values()])

    def record(self, step: int, loss: float | None = None, *, is_measured: bool) -> TrainingStep:
        """Return the record of a step; with ``is_measured`` measure the held-out loss."""
        pruning, held_out = self.pruning, None
        done = pruning is None or pruning.done
        if is_measured:
            check_equal(_trained(self.model, self.gates), {}, self.ranks, step)
            held_out = mean_loss(self.model, self.validation, self.ranks)
            if done:
                self.best.update(held_out)
        return TrainingStep(
            step,
            loss,
            held_out,
            factors={
                name: gate.factor.detach().tolist()
                for each in self.gates
                for name, gate in each.gates.items()
            },
            rate=learning_rate(step, self.settings) if step else None,
            sparsity=pruning.sparsity if pruning else None,
            achieved=pruning.achieved if pruning else None,
            done=done,
        )

    def restore_best(self) -> None:
        """Restore the best weights after the last step.

        Raises:
            ConfigError: Pruning was not done when a held-out loss was measured.
        """
        if self.pruning and not self.pruning.done:
            raise ConfigError(
                f"train.steps: after {self.settings.steps} steps the sparsity is "
                f"{self.pruning.achieved:.6g}, {self.pruning.sparsity:.6g} is due by now, and the "
                "schedule has not ended. Train for more steps, or end the schedule earlier."
            )
        self.best.restore()


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
    measured = [(step.held_out, step.done) for step in steps if step.held_out is not None]
    post, final = measured[0][0], min(loss for loss, done in measured if done)
    return {
        "base": base,
        "post": post,
        "final": final,
        "recovery": recovered_fraction(base, post, final),
        "steps": steps[-1].step,
        "history": [asdict(step) for step in steps],
    }


def _in_batches(data: Data, model: PreTrainedModel, size: int) -> list[Batch]:
    return to_batches(split_batches(data, model, size), model)
