"""Recovery training of a pruned model, with early stopping.

It trains a model with gated units, whose closed gates remain closed; a model without gates; or a
model with adapters of peft or frozen weights, of which only the others are trained. Several
processes each run their share of every batch.

Shapes: N samples, T tokens.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from prunekit.config.distill_table import Distill
from prunekit.config.train_table import Train, Training
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError
from prunekit.models.in_memory import is_distributed
from prunekit.models.units.base import Kept
from prunekit.structured.batches import Batch, Data, eval_mode, split_batches, to_batches
from prunekit.structured.unit_gates import Gates
from prunekit.training.activation_checkpoints import checkpointed_losses
from prunekit.training.data_parallel import (
    Objective,
    StepLosses,
    check_equal,
    equal_shares,
    fine_tuning_loss,
    own_shares,
    training_step,
)
from prunekit.training.distill import Distiller
from prunekit.training.measure import (
    Measure,
    Pruning,
    TrainingStep,
    learning_rate,
    trained_weights,
)
from prunekit.training.saved_state import (
    TrainingLog,
    Unlogged,
    restore_training,
    training_state,
)
from prunekit.training.sharding import sharded
from prunekit.training.teachers import DenseTeacher, SharedTeacher, Teacher

__all__ = ["Pruning", "TrainingStep", "learning_rate", "recover", "recovered_fraction", "summarize"]

RECORD_INTERVAL = 10
"""Steps between two records of the training."""

During = Callable[[Optimizer], AbstractContextManager[Pruning | None]]
"""Returns a context for the training by an optimizer."""


def recover(  # noqa: PLR0913  independent options
    model: PreTrainedModel,
    data: Data,
    held_out: Data,
    settings: Training | None = None,
    gates: Sequence[Gates] = (),
    *,
    ranks: Ranks = SINGLE,
    during: During | None = None,
    distill: Distill | None = None,
    teacher: Teacher | None = None,
    kept: Kept | None = None,
    log: TrainingLog | None = None,
) -> Iterator[TrainingStep]:
    """Train a model with AdamW, then restore its best weights.

    Trained is all that requires a gradient. Dropout is off; see :func:`learning_rate`. Weights from
    before the end of pruning are never the best. If it ends early, by an error or a closed
    generator, the weights are those of the last step done. If ``settings.sharded``, rank 0 has the
    weights afterwards, on the CPU, and other ranks have zeros.

    Args:
        model: The model, trained in place. It may have gates, or adapters of peft.
        data: Token ids [N, T], or batches with the inputs of the loss, used as they are.
        held_out: Likewise; the best weights have the lowest loss on it.
        settings: Learning rate, steps and early stopping.
        gates: Gates of the model; closed units are not updated, values with gradients are.
        ranks: Processes with the same model and data; each runs its share of every batch.
        during: Called with the optimizer; the context that it returns is in force until the end.
        distill: Train towards the outputs of a teacher too.
        teacher: The teacher. By default the model as it is now: with ``gates`` and frozen weights
            a :class:`SharedTeacher`, with ``gates`` or ``during`` a :class:`DenseTeacher`. A model
            that is pruned already needs the one from before.
        kept: Kept blocks and coordinates, if any were removed; see :class:`Distiller`.
        log: Stores records and state. To continue, pass all else as at first.

    Raises:
        ConfigError: Nothing requires a gradient; pruning was not done at the end; the teacher is
            missing or does not fit; the state is of another training.
        NumericsError: A loss is not finite, or ranks differ in weights or data.
    """
    settings = settings or Train()
    texts = (_in_batches(data, model, settings.batch), _in_batches(held_out, model, settings.batch))
    distiller = None
    if distill is not None:
        _check_steps(distill, settings)
        teacher = teacher or _teacher(model, gates, prunes=during is not None)
        steps = distill.steps(settings.steps)
        distiller = Distiller(model, teacher, distill, steps, settings.seed, kept=kept)
    yield from _trained(model, texts, settings, gates, ranks, during, distiller, log or Unlogged())


def _trained(  # noqa: PLR0913, PLR0917  the options of recover
    model: PreTrainedModel,
    data: tuple[list[Batch], list[Batch]],
    settings: Training,
    gates: Sequence[Gates],
    ranks: Ranks,
    during: During | None,
    distiller: Distiller | None,
    log: TrainingLog,
) -> Iterator[TrainingStep]:
    """Train a model; see :func:`recover`."""
    train, validation = data
    _check_trained(model, data, settings, gates, ranks, distiller)
    with ExitStack() as stack:
        stack.enter_context(_in_place(model, settings, ranks, distiller))
        optimizer = _optimizer(model, settings, gates, distiller)
        stack.enter_context(eval_mode(model))
        for each in gates:
            stack.enter_context(each.hold(optimizer))
        pruning = stack.enter_context(during(optimizer)) if during else None
        shares = equal_shares if settings.sharded else own_shares
        own = shares(validation, ranks)
        measure = Measure(model, own, settings, gates, pruning, ranks, distiller)
        done = restore_training(optimizer, measure, log.state) if log.state else 0
        log.state = None  # frees its tensors
        if not done:
            record = measure.record(0, is_measured=True)
            log.add(record)
            yield record
        objective = _objective(settings, distiller)
        for step, batch in _batches(train, settings, done):
            if measure.best.stale == settings.patience:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            check = partial(StepLosses.check_finite, step=step, table=settings.table)
            losses = training_step(model, batch, optimizer, ranks, objective, check)
            is_measured = step % settings.every == 0 or step == settings.steps
            records = []
            if is_measured or step % RECORD_INTERVAL == 0:
                records = [measure.record(step, losses, is_measured=is_measured)]
                log.add(*records)
            # Before the records, at which a run may be stopped.
            state = partial(training_state, optimizer, measure, step)
            log.save(step, state, is_measured=is_measured)
            yield from records
        measure.restore_best()


def _check_trained(
    model: PreTrainedModel,
    data: tuple[list[Batch], list[Batch]],
    settings: Training,
    gates: Sequence[Gates],
    ranks: Ranks,
    distiller: Distiller | None,
) -> None:
    """Refuse a model of which nothing is trained, and ranks that differ."""
    weights = trained_weights(model, gates)
    if not weights:
        raise ConfigError(
            f"{settings.table}: no parameter of the model requires a gradient, so none would be "
            "trained. Set model.requires_grad_(), or add an adapter."
        )
    every = {**dict(model.named_parameters()), **weights}
    every |= distiller.tensors() if distiller else {}
    check_equal(every, {"data": data[0], "held_out": data[1]}, ranks, 0)


def _optimizer(
    model: PreTrainedModel,
    settings: Training,
    gates: Sequence[Gates],
    distiller: Distiller | None,
) -> Optimizer:
    """Return the optimizer of all that is trained."""
    others = distiller.parameters if distiller else []
    trained = [*trained_weights(model, gates).values(), *others]
    parts = [each for each in trained if is_distributed(each)]
    whole = [each for each in trained if not is_distributed(each)]
    # In two groups, as an operation on several tensors takes those of one kind.
    groups = [{"params": each} for each in (parts, whole) if each]
    return torch.optim.AdamW(groups, settings.rate)


def _in_place(
    model: PreTrainedModel, settings: Training, ranks: Ranks, distiller: Distiller | None
) -> AbstractContextManager[None]:
    """Return a context in which model and teacher are sharded, or nothing."""
    if not settings.sharded:
        return nullcontext()
    teacher = distiller and distiller.teacher
    return sharded(model, ranks, teacher.model if isinstance(teacher, DenseTeacher) else None)


def _objective(settings: Training, distiller: Distiller | None) -> Objective:
    """Return the loss that is differentiated."""
    objective = distiller or fine_tuning_loss
    if settings.checkpoint_activations:
        return partial(checkpointed_losses, objective)
    return objective


def _check_steps(distill: Distill, settings: Training) -> None:
    """Refuse a distillation beyond the training."""
    for key, mistake in distill.mistakes(settings.steps).items():
        raise ConfigError(f"distill.{key}: {mistake}")


def _teacher(model: PreTrainedModel, gates: Sequence[Gates], *, prunes: bool) -> Teacher:
    """Return the model as it is now, as a teacher."""
    if gates and not all(each.requires_grad for each in model.parameters()):
        return SharedTeacher(model, gates)
    if gates or prunes:
        return DenseTeacher(model)
    raise ConfigError(
        "distill: the teacher is the model before pruning, and this one is pruned already, or not "
        "at all. Pass teacher=DenseTeacher(model), made before the pruning."
    )


def _batches(train: Sequence[Batch], settings: Training, done: int) -> Iterator[tuple[int, Batch]]:
    """Yield number and batch of each step after those that are done.

    Batches are shuffled in each epoch.

    Args:
        train: The batches.
        settings: Number of steps, and seed of the order.
        done: Steps that are left out.
    """
    order = random.Random(settings.seed)
    queue: list[Batch] = []
    for step in range(1, settings.steps + 1):
        queue = queue or order.sample(train, len(train))
        batch = queue.pop()
        if step > done:
            yield step, batch


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
