"""Ways to a smaller model of given size: APT, its ablations, and what people do instead."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import PreTrainedModel

import prunekit
from bench.training.apt_tasks import AptTask
from prunekit.config.apt_table import Apt
from prunekit.config.distill_table import Distill
from prunekit.config.train_table import Train
from prunekit.structured.parameter_budget import (
    BudgetConstraints,
    counted_parameters,
    select_within_budget,
)
from prunekit.structured.selection import UnitScope
from prunekit.training.apt.growth import initialize, set_scale
from prunekit.training.apt.loop import apt, default_targets
from prunekit.training.chosen_parameters import chosen_parameters
from prunekit.training.lora import add_adapter, merge_adapters
from prunekit.training.recover import TrainingStep, recover

ALSO = ["norms", "biases", "head"]
"""What is trained beside adapters, as by the authors."""


@dataclass(frozen=True)
class Ask:
    """What a contestant has to do.

    Attributes:
        task: The task.
        steps: Steps of training, of all phases together.
        seed: Seed of batches and adapters.
    """

    task: AptTask
    steps: int
    seed: int

    @property
    def shared(self) -> dict[str, Any]:
        """Settings of every training."""
        every = max(1, self.steps // 10)
        return {"steps": self.steps, "seed": self.seed, "every": every, "patience": 100}

    def batches(self) -> tuple[list[Any], list[Any]]:
        """Return training and held-out batches."""
        return self.task.train(self.task.batch, self.seed), self.task.held_out()


Contestant = Callable[[PreTrainedModel, Ask], Iterator[TrainingStep]]
"""Trains and prunes a model in place, yielding its steps."""


@dataclass(frozen=True)
class AptRun:
    """APT with some settings of its own."""

    distills: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, model: PreTrainedModel, ask: Ask) -> Iterator[TrainingStep]:
        """Train adapters that prune: pruning ends after half of the steps."""
        window = max(1, ask.steps // 25)
        values = {
            "parameters": ask.task.parameters,
            "warmup": window * 5 // 2,
            "window": window,
            "windows": 10,
            "decay": min(1.0, 1 / window),
            "batch": ask.task.batch,
            "also": ALSO,
            **ask.shared,
            **ask.task.settings,
            **self.settings,
        }
        distill = Distill(start=values["warmup"]) if self.distills else None
        yield from apt(model, *ask.batches(), Apt(**values), distill=distill)


def prune_once(
    model: PreTrainedModel,
    ask: Ask,
    ranker: str = "salience",
    *,
    refits: bool = False,
    scope: UnitScope = "global",
) -> None:
    """Remove heads and neurons to the budget of the task, by one ranking.

    Args:
        model: The model, pruned in place.
        ask: The task.
        ranker: Name of the ranker.
        refits: Fit the linears that read units to the dense output.
        scope: Whether all layers share a ranking, or each keeps equally many units.
    """
    batches = ask.task.train(ask.task.batch, ask.seed)[:16]
    gates = [prunekit.heads(model), prunekit.neurons(model)]
    scores = {name: score for each in gates for name, score in each.score(ranker, batches).items()}
    groups = [group for each in gates for group in each.groups]
    counted = counted_parameters(model, "blocks")
    whole = sum(each.numel() for each in counted)
    limit = int(ask.task.parameters * whole)
    budget = BudgetConstraints(limit, scope=scope, counted=counted)
    keep = {name: mask for each in gates for name, mask in each.keep.items()}
    kept = select_within_budget(groups, scores, keep, whole, budget)
    for each in gates:
        each.close(kept)
        each.finalize(batches if refits else None)
        each.detach()


def one_shot(
    model: PreTrainedModel, ask: Ask, ranker: str = "salience", *, refits: bool = False
) -> Iterator[TrainingStep]:
    """Prune once, then train all weights."""
    prune_once(model, ask, ranker, refits=refits)
    model.requires_grad_()
    rate = ask.task.settings.get("rate", 1e-4)
    yield from recover(model, *ask.batches(), Train(rate=rate, **ask.shared))


def adapters_then_prune(model: PreTrainedModel, ask: Ask) -> Iterator[TrainingStep]:
    """Train adapters, merge them, and prune once."""
    yield from lora(model, ask)
    prune_once(model, ask)


def one_shot_adapters(model: PreTrainedModel, ask: Ask) -> Iterator[TrainingStep]:
    """Prune once, then train adapters."""
    prune_once(model, ask)
    yield from lora(model, ask)


def lora(model: PreTrainedModel, ask: Ask) -> Iterator[TrainingStep]:
    """Train adapters as those of APT at first, without pruning."""
    targets = ask.task.settings.get("targets") or default_targets(model)
    adapted = add_adapter(model, 8, targets, seed=ask.seed)
    set_scale(model, 2.0)
    initialize(model, ask.seed)
    for parameter in chosen_parameters(model, ALSO):
        parameter.requires_grad_()
    rate = ask.task.settings.get("rate", 2e-4)
    yield from recover(model, *ask.batches(), Train(rate=rate, **ask.shared))
    merge_adapters(adapted)


def full(model: PreTrainedModel, ask: Ask) -> Iterator[TrainingStep]:
    """Train all weights, without pruning."""
    rate = ask.task.settings.get("rate", 1e-4)
    yield from recover(model, *ask.batches(), Train(rate=rate, **ask.shared))


CONTESTANTS: dict[str, Contestant] = {
    "APT": AptRun(),
    "APT without distillation": AptRun(distills=False),
    "APT without growth": AptRun(settings={"growth": 1.0}),
    "APT without running mean": AptRun(settings={"ema": 0.0}),
    "APT without decay of masks": AptRun(settings={"decay": 1.0}),
    "APT without kurtosis": AptRun(settings={"outliers": False}),
    "one shot, then all weights": one_shot,
    "hybrid and refit, then all weights": partial(one_shot, ranker="hybrid", refits=True),
    "one shot, then adapters": one_shot_adapters,
    "adapters, then one shot": adapters_then_prune,
    "adapters, not pruned": lora,
    "all weights, not pruned": full,
}
