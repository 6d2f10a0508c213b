"""ALPS: ADMM with a penalty that adapts to changes of the mask.

Shapes: O output features, B bytes of a row's packed mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import UInt8
from pydantic import Field
from typing_extensions import override

from prunekit.methods.admm import solve_admm
from prunekit.methods.base import Method
from prunekit.methods.layer import Layer, Pruned
from prunekit.methods.projection import Projection
from prunekit.methods.refine import refine
from prunekit.patterns import WeightScope
from prunekit.statistics import Gram, Statistic

if TYPE_CHECKING:
    from torch import Tensor

INTERVAL = 3
"""Iterations between two comparisons of the mask, with the same penalty."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""If more than this share of the mask changed, the penalty is multiplied by the second number."""
CONVERGED = 3e-4
"""Share of the mask below which the search ends, after ``FEWEST_ITERATIONS``."""
FEWEST_ITERATIONS = 30
TYPICAL_ITERATIONS = 45
"""Iterations after which it usually ends; for the plan."""


class Alps(Method):
    """ADMM and conjugate gradients as published (Meng et al., arXiv:2406.07831, Algorithm 1).

    The authors' program also restarts with a lower penalty if the first three iterations change
    almost nothing; this does not.
    """

    name: ClassVar[str] = "alps"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})
    scope: ClassVar[WeightScope] = "layer"
    copies: ClassVar[float] = 8
    squares: ClassVar[int] = 1
    shared_inverses: ClassVar[bool] = True

    damping: float = Field(default=0.01, ge=0, le=1)
    """Added to the Gram matrix's diagonal, as a fraction of its mean."""
    first_penalty: float = Field(default=0.1, gt=0)
    """Weight of the constraint at the start, as a fraction of the Gram matrix's mean diagonal."""
    most_iterations: int = Field(default=300, ge=1, le=100_000)
    """Iterations of ADMM at most; it usually ends after some 30 to 60."""
    refine_iterations: int = Field(default=10, ge=0, le=100_000)
    """Iterations of conjugate gradients at the end, a matrix product each."""

    @override
    def prune(self, layer: Layer) -> Pruned:
        project = Projection([layer])
        penalties = Penalties(self, layer, project)
        (pruned,) = solve_admm([layer], self.damping, project, penalties, penalties.upcoming)
        return refine(layer, pruned, self.damping, self.refine_iterations)

    @override
    def flops(self, outputs: int, inputs: int) -> int:
        return 2 * (self._typical + self.refine_iterations) * outputs * inputs**2

    @override
    def inverses(self, outputs: Sequence[int]) -> int:
        return -(-self._typical // INTERVAL) * len(outputs)

    @property
    def _typical(self) -> int:
        return min(TYPICAL_ITERATIONS, self.most_iterations)


class Penalties:
    """Penalty ρ of each iteration, adapted to changes of the mask.

    Args:
        method: The settings.
        layer: The layer that is pruned; its ranks count changes together.
        project: The projection whose masks are compared.
    """

    def __init__(self, method: Alps, layer: Layer, project: Projection) -> None:
        self._method, self._layer, self._project = method, layer, project
        self._step, self._growth = 0, GROWTH[0][1]

    def __iter__(self) -> Iterator[float]:
        penalty, before = self._method.first_penalty, self._project.bits
        for step in range(self._method.most_iterations):
            if step and step % INTERVAL == 0:
                share = _changed(self._layer, before[0], self._project.bits[0])
                if share == 0 or (step > FEWEST_ITERATIONS and share < CONVERGED):
                    return
                self._step = step
                self._growth = next(growth for least, growth in GROWTH if share > least)
                penalty *= self._growth
                before = self._project.bits
            yield penalty

    def upcoming(self, penalty: float, count: int) -> list[float]:
        """Return at most ``count`` next penalties, assuming the same growth.

        It usually is the same.
        """
        left = -(-(self._method.most_iterations - self._step) // INTERVAL)
        growth = [self._growth] * (min(count, left) - 1)
        return [*accumulate(growth, mul, initial=penalty)]


def _changed(layer: Layer, before: UInt8[Tensor, "O B"], after: UInt8[Tensor, "O B"]) -> float:
    """Return the number of changed mask entries, divided by the number kept."""
    from prunekit_kernels import popcount

    counts = popcount(before ^ after).sum()[None].repeat(2)
    counts[1] = popcount(after).sum()
    layer.all_reduce_sum(counts)
    changed, kept = counts.tolist()
    return changed / max(kept, 1)
