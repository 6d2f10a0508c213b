"""ALPS: ADMM whose penalty follows how much the mask still changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import UInt8
from pydantic import Field
from typing_extensions import override

from prunekit.methods.admm import Projection, search
from prunekit.methods.base import Method
from prunekit.methods.layer import Layer, Pruned
from prunekit.methods.refine import refine
from prunekit.patterns import Scope
from prunekit.statistics import Gram, Statistic

if TYPE_CHECKING:
    from torch import Tensor

EVERY = 3  # iterations between two looks at the mask
STEPS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # of kept weights, this share changed → penalty ×
SETTLED = 3e-4  # share below which it ends, once LEAST iterations are done
LEAST = 30
USUAL = 45
"""Steps after which it mostly ends."""


class Alps(Method):
    """ADMM and conjugate gradients as published (Meng et al., arXiv:2406.07831, Algorithm 1).

    The authors' program also starts anew with a lower penalty if the first three iterations change
    almost nothing; this does not.
    """

    name: ClassVar[str] = "alps"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})
    scope: ClassVar[Scope] = "layer"
    copies: ClassVar[float] = 8
    squares: ClassVar[int] = 1
    shared_inverses: ClassVar[bool] = True

    damping: float = Field(default=0.01, ge=0, le=1)
    """Added to the Gram matrix's diagonal, as a fraction of its mean."""
    first_penalty: float = Field(default=0.1, gt=0)
    """Weight of the constraint at the start, as a fraction of the Gram matrix's mean diagonal."""
    most_iterations: int = Field(default=300, ge=1)
    """Steps of ADMM at most; it mostly ends after some 30 to 60."""
    refine_iterations: int = Field(default=10, ge=0)
    """Steps of conjugate gradients at the end, a matrix product each."""

    @override
    def flops(self, outputs: int, inputs: int) -> int:
        return 2 * (self._usual + self.refine_iterations) * outputs * inputs**2

    @override
    def inverses(self, outputs: Sequence[int]) -> int:
        return -(-self._usual // EVERY) * len(outputs)

    @property
    def _usual(self) -> int:
        return min(USUAL, self.most_iterations)

    @override
    def prune(self, layer: Layer) -> Pruned:
        project = Projection([layer])
        penalties = Penalties(self, layer, project)
        (found,) = search([layer], self.damping, project, penalties, penalties.ahead)
        return refine(layer, found, self.damping, self.refine_iterations)


class Penalties:
    """The penalty of each step, as the mask that ``project`` finds for ``layer`` changes."""

    def __init__(self, method: Alps, layer: Layer, project: Projection) -> None:
        self._method, self._layer, self._project = method, layer, project
        self._step, self._factor = 0, STEPS[0][1]

    def __iter__(self) -> Iterator[float]:
        penalty, before = self._method.first_penalty, self._project.bits
        for step in range(self._method.most_iterations):
            if step and step % EVERY == 0:
                share = _changed(self._layer, before[0], self._project.bits[0])
                if share == 0 or (step > LEAST and share < SETTLED):
                    return
                self._step = step
                self._factor = next(factor for least, factor in STEPS if share > least)
                penalty *= self._factor
                before = self._project.bits
            yield penalty

    def ahead(self, penalty: float, count: int) -> list[float]:
        """Return the penalties to come if the mask goes on to change as much: it mostly does."""
        left = -(-(self._method.most_iterations - self._step) // EVERY)
        factors = [self._factor] * (min(count, left) - 1)
        return [*accumulate(factors, mul, initial=penalty)]


def _changed(layer: Layer, before: UInt8[Tensor, "O B"], after: UInt8[Tensor, "O B"]) -> float:
    """Return how many entries of a layer's packed mask changed, as a share of those that stay."""
    from prunekit_kernels import popcount

    counts = popcount(before ^ after).sum()[None].repeat(2)
    counts[1] = popcount(after).sum()
    layer.add(counts)
    changed, stay = counts.tolist()
    return changed / max(stay, 1)
