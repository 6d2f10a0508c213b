"""Ways to train a sparse model: ours, the loop that people write, and torch's own masks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils import prune as torch_prune
from torch.optim import Optimizer
from transformers import PreTrainedModel

import prunekit
from bench.training.task import AfterStep, Ask, Attach, cubic, due_steps, linears
from prunekit.training.masks import keep_masks


def _nothing() -> None:
    """Leave the work to hooks."""


@contextmanager
def dense(_: PreTrainedModel, __: Optimizer, ___: Ask) -> Iterator[AfterStep]:
    """Train without pruning."""
    yield _nothing


@contextmanager
def by_hand(model: PreTrainedModel, _: Optimizer, ask: Ask) -> Iterator[AfterStep]:
    """Prune by a plain loop: a cubic schedule, magnitude in each layer, zeros after each step."""
    weights = [module.weight for module in linears(model)]
    masks = [torch.ones_like(weight) for weight in weights]
    due, step = {*due_steps(ask)}, 0

    @torch.no_grad()
    def after_step() -> None:
        nonlocal step
        step += 1
        for weight, mask in zip(weights, masks, strict=True):
            if step in due and (count := round(cubic(step, ask) * weight.numel())):
                threshold = weight.abs().flatten().kthvalue(count).values
                mask.copy_(weight.abs() > threshold)
            weight.mul_(mask)

    yield after_step


@contextmanager
def torch_masks(model: PreTrainedModel, _: Optimizer, ask: Ask) -> Iterator[AfterStep]:
    """Prune by ``torch.nn.utils.prune.l1_unstructured`` on a cubic schedule."""
    due, step = {*due_steps(ask)}, 0

    def after_step() -> None:
        nonlocal step
        step += 1
        if step not in due:
            return
        for module in linears(model):
            size = module.weight.numel()
            mask = getattr(module, "weight_mask", None)
            gone = 0 if mask is None else mask.numel() - int(mask.sum())
            # Each call prunes so many of the weights that are left.
            torch_prune.l1_unstructured(module, "weight", round(cubic(step, ask) * size) - gone)

    yield after_step
    for module in linears(model):
        if torch_prune.is_pruned(module):
            torch_prune.remove(module, "weight")


def gradual(method: str, schedule: str = "cubic") -> Attach:
    """Return :class:`prunekit.GradualPruner` with a method and a schedule."""

    @contextmanager
    def attach(model: PreTrainedModel, optimizer: Optimizer, ask: Ask) -> Iterator[AfterStep]:
        with prunekit.GradualPruner(
            model,
            optimizer,
            method=method,
            sparsity=ask.sparsity,
            schedule=schedule,
            end=ask.end,
            every=ask.every,
            tokens=None if method == "magnitude" else ask.tokens,
        ):
            yield _nothing

    return attach


def one_shot(method: str) -> Attach:
    """Return pruning by a method before the training, then training under masks."""

    @contextmanager
    def attach(model: PreTrainedModel, optimizer: Optimizer, ask: Ask) -> Iterator[AfterStep]:
        tokens = None if method == "magnitude" else ask.tokens
        settings = {"sparsity": ask.sparsity, "measure_error": False}
        prunekit.prune(model.eval(), tokens, method=method, **settings)
        with keep_masks(model.train(), optimizer):
            yield _nothing

    return attach


CONTESTANTS: dict[str, Attach] = {
    "by hand, cubic": by_hand,
    "torch.nn.utils.prune, cubic": torch_masks,
    "GradualPruner, cubic": gradual("magnitude"),
    "one shot, then train": one_shot("magnitude"),
    "admm masks, then train": one_shot("admm"),
    "GradualPruner of wanda, cubic": gradual("wanda"),
    "GradualPruner of admm, cubic": gradual("admm"),
}
"""By magnitude unless the name says otherwise."""
