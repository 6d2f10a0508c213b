"""ADMM: the mask is searched for together with the weights that make up for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Bool, Float
from pydantic import Field
from typing_extensions import override

from prunekit.errors import NumericsError
from prunekit.layer import Layer, Pruned
from prunekit.methods.base import Method
from prunekit.patterns import Pattern, Scope
from prunekit.refinement import refine
from prunekit.statistics import Gram, Statistic

if TYPE_CHECKING:
    from torch import Tensor

EVERY = 5  # iterations from one penalty to the next


class Admm(Method):
    """ADMM with a rising penalty, then conjugate gradients on the mask that it found.

    The problem is that of ALPS (Meng et al., arXiv:2406.07831), the penalty rises geometrically.
    """

    name: ClassVar[str] = "admm"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})
    scope: ClassVar[Scope] = "layer"

    damping: float = Field(default=0.001, ge=0, le=1)
    """Added to the Gram matrix's diagonal, as a fraction of its mean."""
    iterations: int = Field(default=30, ge=1)
    """Steps of ADMM, a matrix product each; 60 err 1 to 2 % less."""
    first_penalty: float = Field(default=0.1, gt=0)
    """Weight of the constraint at the start, as a fraction of the Gram matrix's mean diagonal."""
    last_penalty: float = Field(default=5.0, gt=0)
    """Weight of the constraint in the last five steps."""
    refine_iterations: int = Field(default=10, ge=0)
    """Steps of conjugate gradients at the end, a matrix product each."""

    @override
    def prune(self, layer: Layer) -> Pruned:
        found = search(layer, self.damping, Projection(layer.pattern, layer.sparsity), self._rise())
        return refine(layer, found, self.damping, self.refine_iterations)

    def _rise(self) -> list[float]:
        last = max((self.iterations - 1) // EVERY, 1)
        ratio = self.last_penalty / self.first_penalty
        return [
            self.first_penalty * ratio ** (step // EVERY / last) for step in range(self.iterations)
        ]


@dataclass
class Projection:
    """Projects onto what a pattern allows; ``keep`` is the mask of the last time."""

    pattern: Pattern
    sparsity: float
    keep: Bool[Tensor, "O I"] = None  # pyright: ignore[reportAssignmentType]

    def __call__(self, x: Float[Tensor, "O I"], dual: Float[Tensor, "O I"]) -> None:
        """Replace ``x`` by the nearest allowed to x + dual, and ``dual`` by what is left."""
        x += dual
        self.keep = self.pattern.keep(x.square(), self.sparsity)
        dual.copy_(x).masked_fill_(self.keep, 0)
        x -= dual


def search(layer: Layer, damping: float, project: Projection, penalties: Iterable[float]) -> Pruned:
    """Return the mask that ADMM finds and the weights that it found with it.

    A dead input never spoke, so its weights go first; those that may stay keep their value, as do
    all where nothing is pruned.

    Raises:
        NumericsError: The Gram matrix is not one.
    """
    from prunekit_kernels import admm, mean_diagonal, unit_scale

    gram = layer.stats[Gram].full
    scale = unit_scale(gram, damping * mean_diagonal(gram))
    target = (layer.weight.contiguous() * scale).masked_fill_(gram.diagonal() == 0, 0)
    try:
        found = admm(target, gram, scale, project, penalties)
    except ArithmeticError as error:
        raise NumericsError(f"{layer.name}: {error} Use more calibration tokens.") from error
    change = found.sub_(target).div_(scale)
    weight = change.add_(layer.weight).masked_fill_(~project.keep, 0)
    return Pruned(weight, project.keep, {"damping": damping})
