"""Estimates the time of a run from a measurement on its device.

Each kind of work is measured on matrices of the model's shapes, or of a part of them, and scaled by
the number of operations. Reading and writing files is left out.

Shapes: O output features, I input features, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.formatting import duration
from prunekit.methods.layer import Layer
from prunekit.methods.refine import refine
from prunekit.models.devices import synchronized_seconds
from prunekit.models.layout import Linear
from prunekit.runs.sparsify.plan import Plan
from prunekit.sparsify.error import relative_error
from prunekit.sparsify.work_estimate import row_flops
from prunekit.statistics import CrossGram, StageStatistics

WIDEST = 1024
"""Maximum number of input and of output features of the measured layer."""
TOKENS = 1024
REPEATS = 3


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of a run on its slowest rank, by kind of work."""

    forward: float
    gather: float
    solve: float

    @property
    def total(self) -> float:
        """Seconds of the whole run, without files."""
        return self.forward + self.gather + self.solve

    def describe(self, blocks: int) -> str:
        """Return the estimate in words, for a model of ``blocks`` blocks."""
        return (
            f"about {duration(self.total)}, {duration(self.total / blocks)} a block, files apart: "
            f"forward {duration(self.forward)}, gathering {duration(self.gather)}, "
            f"solving {duration(self.solve)}"
        )


def estimate_time(plan: Plan) -> TimeEstimate:
    """Measure for about a second; return the time of the whole run."""
    widest = max(plan.linears, key=lambda linear: linear.size)
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = min(widest.outputs, WIDEST), _measured_inputs(widest)
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


def _measured_inputs(linear: Linear) -> int:
    """Return the input features, halved while above ``WIDEST`` and divisible by 128.

    Every pattern divides the result as it divides the original.
    """
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
        fresh = StageStatistics(list(stats))  # without factors cached by an earlier repeat
        layer = Layer("measured", weight, fresh, recipe.pattern.at(sparsity), sparsity)
        pruned = recipe.method.prune(layer)
        if recipe.refine:
            pruned = refine(layer, pruned)
        relative_error(weight, pruned.weight, fresh)

    return _seconds(solve, plan.device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of ``REPEATS`` calls, after one to warm up."""
    call()
    least = float("inf")
    for _ in range(REPEATS):
        began = synchronized_seconds(device)
        call()
        least = min(least, synchronized_seconds(device) - began)
    return least
