"""Zeros during training: made on a schedule, or kept by masks."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from prunekit.models.experts import unfused
from prunekit.runs.record import Record
from prunekit.runs.sparsify.shards import LayerRecord
from prunekit.runs.stage import Stage
from prunekit.runs.trained.plan import TrainedPlan, gradual_settings
from prunekit.sparsify.in_memory import ModelPruner
from prunekit.structured.batches import Batch
from prunekit.training.gradual import GradualPruner
from prunekit.training.masks import Masks
from prunekit.training.weight_views import find_weights


def prune_once(
    plan: TrainedPlan, model: PreTrainedModel, batches: Sequence[Batch]
) -> Generator[Record, None, dict[str, LayerRecord]]:
    """Prune a model in memory; return a record of each linear.

    Args:
        plan: The plan of the run.
        model: The model, changed in place.
        batches: Calibration batches without padding.
    """
    yield Record("phase", "prune before training", {"steps": len(plan.sizes)}, Stage.PRUNING)
    records = {}
    with unfused(model):
        pruner = ModelPruner.of(model, batches, plan.config.prune, plan.recipe)
        for result in pruner.prune(pruner.allocate(plan.config.prune.sparsity)):
            records[result.linear.name] = result.as_record()
            yield Record("step", result.linear.name)
    return records


def gradual_pruner(
    plan: TrainedPlan, model: PreTrainedModel, optimizer: Optimizer, batches: Sequence[Batch]
) -> GradualPruner:
    """Return the pruner that a config describes, in force.

    Args:
        plan: The plan of the run.
        model: The model.
        optimizer: The optimizer that trains it.
        batches: Calibration batches without padding, for methods that need statistics.
    """
    prune = plan.config.prune
    schedule = prune.gradual
    assert schedule is not None
    return GradualPruner(
        model,
        optimizer,
        schedule=schedule.name,
        start=schedule.start,
        end=schedule.end,
        every=schedule.every,
        initial=schedule.initial,
        tokens=batches if prune.calibration_user else None,
        regrow=prune.regrow,
        regrow_every=prune.regrowth_interval,
        **gradual_settings(prune),
    )


@dataclass(frozen=True)
class KeptZeros:
    """Zeros of a model that was pruned before, kept by masks.

    Attributes:
        masks: The masks in force.
        sparsity: The sparsity that was asked for.
    """

    masks: Masks
    sparsity: float
    done: bool = True

    @property
    def achieved(self) -> float:
        """Fraction of zeros in the masked weights, counted."""
        return self.masks.sparsity

    @property
    def details(self) -> Mapping[str, Any]:
        """No further facts for the records."""
        return {}

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """The parameters whose values they change: none."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return no state: the zeros are those of the model."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


@contextmanager
def kept_zeros(
    plan: TrainedPlan, model: PreTrainedModel, optimizer: Optimizer
) -> Iterator[KeptZeros]:
    """Mask the pruned weights of a model within the context."""
    linears = [linear for block in plan.blocks for linear in block.pruned]
    _, masked = find_weights(model, linears)
    with Masks(masked, optimizer) as masks:
        yield KeptZeros(masks, plan.config.prune.sparsity)
