"""Traps of pruning while training, tried on the contestants.

Each trap is a function that returns "yes" where a contestant does right, otherwise its mistake.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from transformers import PreTrainedModel

from bench.training.contestants import CONTESTANTS
from bench.training.others import ABSENT, fasterai_masks, installed
from bench.training.task import (
    AfterStep,
    Ask,
    Attach,
    Task,
    cubic,
    linears,
    loss_of,
    train_step,
    weights,
)
from prunekit.errors import PrunekitError

SPARSITY = 0.7
TRIED: dict[str, tuple[str, Attach]] = {
    "by hand": ("torch", CONTESTANTS["by hand, cubic"]),
    "torch.nn.utils.prune": ("torch", CONTESTANTS["torch.nn.utils.prune, cubic"]),
    "fasterai's SparsifyCallback": ("fasterai", fasterai_masks),
    "GradualPruner": ("prunekit", CONTESTANTS["GradualPruner, cubic"]),
}
"""The library of each contestant, and how it prunes; all on a cubic schedule."""
YES = "yes"
Trap = Callable[[Task, Attach], str]


@dataclass(frozen=True)
class Training:
    """A model that is trained and pruned."""

    model: PreTrainedModel
    optimizer: Optimizer
    batch: Tensor
    after_step: AfterStep

    def steps(self, count: int) -> None:
        """Make some steps."""
        for _ in range(count):
            train_step(self.model, self.optimizer, self.batch)
            self.after_step()


@contextmanager
def started(
    found: Task,
    attach: Attach,
    ask: Ask,
    *,
    optimizer: Callable[..., Optimizer] = AdamW,
    prepare: Callable[[PreTrainedModel], object] = lambda _: None,
) -> Iterator[Training]:
    """Attach a contestant to a new model.

    Args:
        found: The model and its text.
        attach: The contestant.
        ask: What it has to do.
        optimizer: Class of the optimizer.
        prepare: Changes the model first.
    """
    torch.manual_seed(0)
    model = found.load()
    prepare(model)
    trained = [each for each in model.parameters() if each.requires_grad]
    stepping = optimizer(trained, lr=1e-3, weight_decay=0.1)
    with attach(model, stepping, ask) as after_step:
        yield Training(model, stepping, found.samples(2, seed=0), after_step)


class Still(SGD):
    """An optimizer that changes nothing."""

    def __init__(self, parameters: list[Tensor], **_: float) -> None:
        super().__init__(parameters, lr=0.0)


def _count(model: PreTrainedModel, share: float, *, slack: float = 0.001) -> str:
    """Return "yes" if each linear has this share of zeros; else the zeros of all.

    Args:
        model: The model.
        share: The fraction of zeros.
        slack: Fraction of the weights by which the count may differ, beyond rounding.
    """
    every = [weight.detach() for weight in weights(model)]
    zeros = [int((weight == 0).sum()) for weight in every]
    wanted = [share * weight.numel() for weight in every]
    allowed = [1 + slack * weight.numel() for weight in every]
    if all(abs(a - b) < most for a, b, most in zip(zeros, wanted, allowed, strict=True)):
        return YES
    return f"no: {sum(zeros):,} zeros instead of {sum(wanted):,.0f}"


def end_is_due(found: Task, attach: Attach) -> str:
    """The sparsity is reached where `end` is no multiple of `every`."""
    with started(found, attach, Ask(SPARSITY, end=7, every=3)) as training:
        training.steps(8)
        return _count(training.model, SPARSITY)


def adamw_leaves_zeros(found: Task, attach: Attach) -> str:
    """Zeros remain under AdamW with weight decay."""
    with started(found, attach, Ask(SPARSITY, end=2, every=1)) as training:
        training.steps(6)
        return _count(training.model, SPARSITY)


def momentum_leaves_zeros(found: Task, attach: Attach) -> str:
    """Zeros remain under SGD with momentum."""
    momentum = partial(SGD, momentum=0.9)
    with started(found, attach, Ask(SPARSITY, end=2, every=1), optimizer=momentum) as training:
        training.steps(6)
        return _count(training.model, SPARSITY)


def moments_are_zero(found: Task, attach: Attach) -> str:
    """The optimizer's state of pruned weights is zero."""
    with started(found, attach, Ask(SPARSITY, end=3, every=1)) as training:
        training.steps(6)
        left = 0
        for module in linears(training.model):
            # torch's masks keep the parameter under another name.
            parameters = dict(module.named_parameters())
            parameter = parameters.get("weight_orig", parameters.get("weight"))
            moment = training.optimizer.state[parameter]["exp_avg"]  # pyright: ignore
            left += int((moment[module.weight == 0] != 0).sum())
        return YES if not left else f"no: {left:,} moments are not"


def counts_are_exact(found: Task, attach: Attach) -> str:
    """In each matrix exactly as many weights are pruned as asked for, rounded."""
    with started(found, attach, Ask(SPARSITY, end=2, every=1)) as training:
        training.steps(4)
        return _count(training.model, SPARSITY, slack=0)


def ties_are_counted(found: Task, attach: Attach) -> str:
    """Of weights of one magnitude exactly as many are pruned as asked for."""

    @torch.no_grad()
    def equal(model: PreTrainedModel) -> None:
        for weight in weights(model):
            weight.copy_(torch.where(weight < 0, -0.02, 0.02))

    ask = Ask(SPARSITY, end=1, every=1)
    with started(found, attach, ask, prepare=equal, optimizer=Still) as training:
        training.steps(2)
        return _count(training.model, SPARSITY, slack=0)


def skipped_steps_do_not_count(found: Task, attach: Attach) -> str:
    """A step that a GradScaler skips does not count."""
    ask = Ask(SPARSITY, end=4, every=1)
    with started(found, attach, ask) as training:
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        for scale in (1.0, float("inf"), 1.0):
            loss = loss_of(training.model, training.batch) * scale
            scaler.scale(loss).backward()
            scaler.step(training.optimizer)
            scaler.update()
            training.optimizer.zero_grad()
            training.after_step()
        with torch.no_grad():
            loss_of(training.model, training.batch)  # torch's masks act in a forward
        return _count(training.model, cubic(2, ask))


def names_remain(found: Task, attach: Attach) -> str:
    """A checkpoint in between has the model's own tensors."""
    with started(found, attach, Ask(SPARSITY, end=2, every=1)) as training:
        training.steps(1)
        added = training.model.state_dict().keys() - found.load().state_dict().keys()
        return YES if not added else f"no: {len(added)} others, such as {min(added)}"


def copies(found: Task, attach: Attach) -> str:
    """The model can be copied in between, as averages of weights do."""
    with started(found, attach, Ask(SPARSITY, end=2, every=1)) as training:
        training.steps(1)
        try:
            copy.deepcopy(training.model)
        except RuntimeError as error:
            return f"no: {str(error).split('.')[0]}"
        return YES


def frozen_remain(found: Task, attach: Attach) -> str:
    """Frozen weights do not thaw."""

    def freeze(model: PreTrainedModel) -> None:
        for weight in weights(model)[:4]:
            weight.requires_grad_(False)  # noqa: FBT003  its name differs between classes

    with started(found, attach, Ask(SPARSITY, end=2, every=1), prepare=freeze) as training:
        training.steps(3)
        frozen = sum(not each.requires_grad for each in training.model.parameters())
        return YES if frozen == 4 else f"no: {4 - frozen} of 4"


def assigned_weights(found: Task, attach: Attach) -> str:
    """After `load_state_dict(assign=True)` it is refused or exact, not silently wrong."""
    with started(found, attach, Ask(SPARSITY, end=4, every=1)) as training:
        training.steps(1)
        state = {name: value.clone() for name, value in training.model.state_dict().items()}
        try:
            training.model.load_state_dict(state, assign=True)
            for each in training.model.parameters():
                each.requires_grad_()
            training.steps(4)
        except PrunekitError:
            return f"{YES}, refused"
        return _count(training.model, SPARSITY)


TRAPS: tuple[Trap, ...] = (
    end_is_due,
    adamw_leaves_zeros,
    momentum_leaves_zeros,
    moments_are_zero,
    counts_are_exact,
    ties_are_counted,
    skipped_steps_do_not_count,
    names_remain,
    copies,
    frozen_remain,
    assigned_weights,
)


def tried(found: Task) -> list[dict[str, str]]:
    """Return a row for each trap: its title, and the outcome of each contestant."""
    return [
        {"trap": (trap.__doc__ or "").strip()}
        | {
            name: trap(found, attach) if installed(library) else ABSENT
            for name, (library, attach) in TRIED.items()
        }
        for trap in TRAPS
    ]
