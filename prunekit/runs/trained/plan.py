"""Plan of a run that prunes weights and trains the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType

from prunekit.config.prune_table import Prune
from prunekit.formatting import count, size
from prunekit.runs.distillation import distillation_words
from prunekit.runs.plan_base import fact_table
from prunekit.runs.sharded_training import held_words
from prunekit.runs.sparsify.plan import WeightsPlan, linear_table
from prunekit.runs.texts import data_words
from prunekit.runs.training import schedule_words, training_words
from prunekit.runs.training_memory import saved_state_words

OF_THE_SCHEDULE = frozenset(
    {"end", "start", "every", "schedule", "initial_sparsity", "regrow", "regrow_every"}
)
"""Keys of ``[prune]`` that a gradual pruner takes by other names."""
ONLY_ONCE = frozenset({"steps", "recover", "recover_rank", "permute", "measure_error"})
"""Keys of ``[prune]`` for a model that is pruned once, at their defaults while it is trained."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainedPlan(WeightsPlan):
    """Plan of a run that prunes weights and trains the model.

    Attributes:
        memory: Estimated peak bytes of each rank, by use.
    """

    memory: Mapping[str, int]

    def describe(self) -> RenderableType:
        """Return the plan as a table to print."""
        return Group(fact_table(_facts(self)), *linear_table(self))


def gradual_settings(prune: Prune) -> dict[str, Any]:
    """Return the arguments of a gradual pruner besides its schedule."""
    values = prune.model_dump(mode="json")
    return {key: values[key] for key in values.keys() - OF_THE_SCHEDULE - ONLY_ONCE}


def _facts(plan: TrainedPlan) -> dict[str, str]:
    """Return the rows of the printed plan, by their heads."""
    config, prune, train = plan.config, plan.config.prune, plan.config.train
    assert train is not None
    assert config.calibration is not None
    rows = {
        "model": f"{config.model.path}  ({type(plan.model).__name__}, "
        f"{count(plan.parameters)} parameters, {len(plan.blocks)} blocks)",
        "prune": f"{prune.method.name}, {prune.pattern.name}, sparsity {prune.sparsity:g}, "
        f"allocation {prune.allocation.name}, {schedule_words(prune)}",
        "train": training_words(train, train.adapter),
        "gathers": ", ".join(kind.name for kind in plan.recipe.needs) or "nothing",
        "runs": f"on {plan.device} in float32, with the whole model in memory",
        "ranks": f"{plan.ranks.size}: samples of a batch are shared; each has {held_words(plan)}",
        "output": f"{config.output.path}  (at most {size(plan.checkpoint.nbytes)}"
        f"{plan.joining_words}{saved_state_words(plan)})",
        "memory": f"about {size(sum(plan.memory.values()))}: "
        + ", ".join(f"{name} {size(value)}" for name, value in plan.memory.items()),
        **data_words(config, plan.lengths),
    }
    if config.distill:
        rows["distill"] = distillation_words(config.distill, train.steps)
    if not plan.ranks.is_distributed:
        del rows["ranks"]
    return rows
