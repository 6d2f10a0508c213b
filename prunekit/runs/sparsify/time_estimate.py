"""How long a run will take: its operations at the speed of a short measurement on the same device.

Each kind of work is done once on matrices of the model's shapes, or of a part of them, and scaled
by its operations. Reading and writing files is left out.

Shapes: O output features, I input features, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.formatting import duration
from prunekit.methods.layer import Layer
from prunekit.methods.refine import refine
from prunekit.models.devices import now
from prunekit.models.layout import Linear
from prunekit.runs.sparsify.plan import Plan
from prunekit.sparsify.error import relative_error
from prunekit.sparsify.work_estimate import row_flops
from prunekit.statistics import CrossGram, StageStatistics

WIDEST = 1024
"""Inputs and outputs of what is measured, at most."""
TOKENS = 1024
REPEATS = 3


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds that a run will take, by what they are spent on; those of the slowest rank."""

    forward: float
    gather: float
    solve: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.gather + self.solve

    def describe(self, blocks: int) -> str:
        """Return the estimate in words."""
        return (
            f"about {duration(self.total)}, {duration(self.total / blocks)} a block, files apart: "
            f"forward {duration(self.forward)}, gathering {duration(self.gather)}, "
            f"solving {duration(self.solve)}"
        )


def estimate_time(plan: Plan) -> TimeEstimate:
    """Measure for a second or so, and return what a run of this plan will take here."""
    widest = max(plan.linears, key=lambda linear: linear.size)
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = min(widest.outputs, WIDEST), _whole(widest)
    x = torch.randn(TOKENS, inputs, generator=generator).to(plan.device, plan.dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(plan.device, plan.dtype)
    work = plan.work
    with torch.no_grad():
        product = _seconds(lambda: x @ weight.T, plan.device)
        stats, gathering = _gather(plan, x)
        solving = _solve(plan, weight.float(), stats)
    gathered = TOKENS * sum(kind.flops(inputs) for kind in plan.recipe.needs)
    solved = row_flops(plan.recipe, outputs, inputs)
    method = plan.recipe.method
    solved += method.inverses([outputs]) * method.flops_of_inverse(inputs)
    return TimeEstimate(
        forward=work.forward * product / (2 * TOKENS * outputs * inputs),
        gather=work.gather * gathering / gathered if gathered else 0.0,
        solve=max(work.solve) * solving / solved,
    )


def _whole(linear: Linear) -> int:
    """Return a part of the inputs, of which every pattern divides as many as it did."""
    inputs = linear.inputs
    while inputs > WIDEST and inputs % 2 == 0 and (inputs // 2) % 64 == 0:
        inputs //= 2
    return inputs


def _gather(plan: Plan, x: Tensor) -> tuple[StageStatistics, float]:
    kinds = plan.recipe.needs
    statistics = [kind(x.shape[1], plan.device) for kind in kinds]

    def update() -> None:
        for statistic in statistics:
            if isinstance(statistic, CrossGram):
                statistic.update_pair(x, x)
            else:
                statistic.update(x)

    return StageStatistics(statistics), _seconds(update, plan.device) if kinds else 0.0


def _solve(plan: Plan, weight: Tensor, stats: StageStatistics) -> float:
    recipe, sparsity = plan.recipe, plan.config.prune.sparsity

    def solve() -> None:
        again = StageStatistics(list(stats))  # so that nothing is remembered of the last time
        layer = Layer("measured", weight, again, recipe.pattern.at(sparsity), sparsity)
        pruned = recipe.method.prune(layer)
        if recipe.refine:
            pruned = refine(layer, pruned)
        relative_error(weight, pruned.weight, again)

    return _seconds(solve, plan.device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds of a few calls, after one to warm up."""
    call()
    least = float("inf")
    for _ in range(REPEATS):
        began = now(device)
        call()
        least = min(least, now(device) - began)
    return least
