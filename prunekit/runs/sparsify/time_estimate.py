"""Estimates the time of a run that sets weights to zero.

Shapes: T tokens, I input features, O output features.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit.methods.layer import Layer
from prunekit.methods.refine import refine
from prunekit.runs.sparsify.plan import Plan
from prunekit.runs.time_estimate import (
    TimeEstimate,
    measured_layer,
    seconds_of_product,
    shortest_seconds,
)
from prunekit.sparsify.error import relative_error
from prunekit.sparsify.work_estimate import row_flops
from prunekit.statistics import CrossGram, StageStatistics


def estimate_time(plan: Plan) -> TimeEstimate:
    """Measure for about a second; return the time of the whole run."""
    widest = max(plan.linears, key=lambda linear: linear.size)
    x, weight = measured_layer(widest.outputs, widest.inputs, plan.device, plan.dtype)
    (tokens, inputs), work = x.shape, plan.work
    with torch.no_grad():
        product = seconds_of_product(x, weight)
        stats, gathering = _gather(plan, x)
        solving = _solve(plan, weight.float(), stats)
    gathered = tokens * sum(kind.flops(inputs) for kind in plan.recipe.needs)
    solved = row_flops(plan.recipe, len(weight), inputs)
    method = plan.recipe.method
    solved += method.inverses([len(weight)]) * method.flops_of_inverse(inputs)
    return TimeEstimate(
        {
            "forward": work.forward * product,
            "gathering": work.gather * gathering / gathered if gathered else 0.0,
            "solving": max(work.solve) * solving / solved,
        }
    )


def _gather(plan: Plan, x: Float[Tensor, "T I"]) -> tuple[StageStatistics, float]:
    kinds = plan.recipe.needs
    statistics = [kind(x.shape[1], plan.device) for kind in kinds]

    def update() -> None:
        for statistic in statistics:
            if isinstance(statistic, CrossGram):
                statistic.update_pair(x, x)
            else:
                statistic.update(x)

    return StageStatistics(statistics), shortest_seconds(update, plan.device) if kinds else 0.0


def _solve(plan: Plan, weight: Float[Tensor, "O I"], stats: StageStatistics) -> float:
    recipe, sparsity = plan.recipe, plan.config.prune.sparsity

    def solve() -> None:
        fresh = StageStatistics(list(stats))  # without factors cached by an earlier repeat
        layer = Layer("measured", weight, fresh, recipe.pattern.at(sparsity), sparsity)
        pruned = recipe.method.prune(layer)
        if recipe.refine:
            pruned = refine(layer, pruned)
        relative_error(weight, pruned.weight, fresh)

    return shortest_seconds(solve, plan.device)
