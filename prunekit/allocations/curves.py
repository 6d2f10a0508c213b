"""Curves: prune more where the error of a refined layer rises least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

from pydantic import Field
from typing_extensions import override

from prunekit.allocations.base import Allocation, Survey
from prunekit.methods.layer import Layer, Pruned
from prunekit.methods.refine import refine
from prunekit.methods.wanda import Wanda
from prunekit.patterns import Pattern
from prunekit.patterns.n_of_m import NOfM
from prunekit.statistics import Gram, Statistic

POINTS = 5
"""Sparsities at which a layer's error is measured; n:m has at most two on each side."""
ITERATIONS = 5
"""Steps of conjugate gradients per measurement."""


class Curves(Allocation):
    """The least sum of relative errors, within ``spread`` of the target.

    An n:m pattern becomes a mix: 2:8 to 6:8 for 4:8, 1:4 to 3:4 for 2:4. The layer at which the
    budget ends gets the nearest of them, so that the total may miss the budget by part of a layer.

    Each layer of the dense model is pruned to five sparsities by Wanda's score and refined by five
    steps of conjugate gradients: 25 matrix products and no factorization. The slopes of the lower
    convex hull of its relative errors ‖WX − W′X‖² / ‖WX‖² are the cost per weight; over all layers,
    the cheapest weights are pruned first, until the budget is spent.
    """

    name: ClassVar[str] = "curves"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})
    mixes: ClassVar[bool] = True

    spread: float = Field(default=0.1, gt=0, lt=0.5)
    """No layer's sparsity differs from the target by more than this, unless the pattern is n:m."""

    @override
    def allocate(
        self, sizes: Mapping[str, int], survey: Survey, sparsity: float
    ) -> dict[str, float]:
        grid: list[float] = []
        curves, mixed = {}, False
        for layers in survey():
            for layer in layers:
                if layer.name in sizes:
                    mixed = isinstance(layer.pattern, NOfM)
                    grid = self._grid(layer.pattern, sparsity)
                    curves[layer.name] = [_error(layer, at) for at in grid]
        found = split_budget(curves, sizes, grid, sparsity)
        if not mixed:
            return found
        return {name: min(grid, key=lambda at: abs(at - value)) for name, value in found.items()}

    def _grid(self, pattern: Pattern, sparsity: float) -> list[float]:
        """Return the sparsities to measure, in ascending order."""
        if isinstance(pattern, NOfM):
            reach = POINTS // 2
            least, most = max(pattern.n - reach, 1), min(pattern.n + reach, pattern.m - 1)
            return [1 - n / pattern.m for n in range(most, least - 1, -1)]
        spread = min(self.spread, sparsity, 1 - sparsity)
        return [sparsity + spread * (2 * point / (POINTS - 1) - 1) for point in range(POINTS)]


def split_budget(
    curves: Mapping[str, Sequence[float]],
    sizes: Mapping[str, int],
    grid: Sequence[float],
    sparsity: float,
) -> dict[str, float]:
    """Return the sparsities that meet a budget with least error.

    Between two points of its lower convex hull an error is linear, so that taking segments by
    slope, lowest first, is optimal.

    Args:
        curves: Errors of each layer at the sparsities of ``grid``.
        sizes: Number of weights of each layer.
        grid: Sparsities, in ascending order.
        sparsity: Fraction of zeros of all layers together.
    """
    result = dict.fromkeys(curves, grid[0])
    segments = []
    for name, errors in curves.items():
        for (start, low), (end, high) in pairwise(_hull([*zip(grid, errors, strict=True)])):
            weights = (end - start) * sizes[name]
            if weights:
                segments.append(((high - low) / weights, name, end, weights))
    budget = (sparsity - grid[0]) * sum(sizes[name] for name in curves)
    # The sort is stable: of equal slopes those of earlier layers are taken first.
    for _, name, end, weights in sorted(segments, key=lambda segment: segment[0]):
        taken = min(weights, budget)
        result[name] = end if taken == weights else result[name] + taken / sizes[name]
        budget -= taken
        if budget <= 0:
            break
    return result


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lower convex hull of points with ascending x."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (a, low), (b, high) = hull[-2:]
            if (high - low) * (x - a) < (y - low) * (b - a):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _error(layer: Layer, sparsity: float) -> float:
    """Return the relative error of a layer that is pruned and refined."""
    keep = layer.pattern.at(sparsity).keep(Wanda().score(layer), sparsity)
    pruned = Pruned(layer.weight.where(keep, 0), keep)
    change = refine(layer, pruned, iterations=ITERATIONS).weight - layer.weight
    gram = layer.stats[Gram].full
    energy, loss = (float(((x @ gram) * x).sum()) for x in (layer.weight, change))
    return max(loss, 0.0) / energy if energy > 0 else 0.0
