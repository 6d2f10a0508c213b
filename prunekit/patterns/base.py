"""Which zeros are allowed.

Shapes: O output features, I input features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from jaxtyping import Bool, Float
from typing_extensions import override

if TYPE_CHECKING:
    from prunekit_kernels import Groups
    from torch import Tensor

Scope = Literal["row", "layer", "block"]


class Pattern(ABC):
    """A rule that turns scores into a ``keep`` mask with exact counts.

    Attributes:
        name: How the pattern is written in a config, e.g. ``"2:4"``.
        stride: How many neighbouring columns are chosen together, by :meth:`keep_columns`, while a
            column sweep (SparseGPT) moves over the weight; None when the whole matrix has to be
            chosen before.
        tiled: Whether scores are summed over weights that stay or go together.
    """

    name: str
    stride: int | None
    spelling: ClassVar[str]
    tiled: bool = False

    @classmethod
    @abstractmethod
    def parse(cls, text: str, scope: Scope) -> Self | None:
        """Return the pattern that ``text`` spells, or None if it is another kind."""

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the pattern itself fixes, or None if the user says it."""
        return None

    def at(self, sparsity: float) -> Pattern:  # noqa: ARG002  for subclasses
        """Return the pattern of a layer that is to have ``sparsity``."""
        return self

    def misfit(self, outputs: int, inputs: int) -> str | None:  # noqa: ARG002  for subclasses
        """Say why a matrix of this shape cannot have the pattern, or None if it can."""
        return None

    @abstractmethod
    def keep(self, score: Float[Tensor, "O I"], sparsity: float) -> Bool[Tensor, "O I"]:
        """Return what stays: the highest scores; ties keep the lower index, NaN counts as lowest.

        Of each group exactly :func:`pruned_count` go.
        """

    def keep_columns(
        self,
        score: Float[Tensor, "O C"],
        start: int,  # noqa: ARG002  for subclasses
        sparsity: float,
    ) -> Bool[Tensor, "O C"]:
        """Return what stays of the columns from ``start`` on, ``stride`` of them or the rest."""
        return self.keep(score, sparsity)

    def violations(self, keep: Bool[Tensor, "O I"]) -> int:  # noqa: ARG002  for subclasses
        """Count the groups of a mask that break the pattern."""
        return 0


class Grouped(Pattern):
    """A pattern that is counts within groups, which scores, solvers and kernels choose by alike."""

    @abstractmethod
    def groups(self, outputs: int, inputs: int, sparsity: float) -> Groups:
        """Return which weights of a matrix compete, and that :func:`pruned_count` of each go."""

    def groups_of_columns(self, outputs: int, start: int, end: int, sparsity: float) -> Groups:
        """Return the same for the columns from ``start`` on, ``stride`` of them or the rest."""
        return self.groups(outputs, end - start, sparsity)

    @override
    def keep(self, score: Float[Tensor, "O I"], sparsity: float) -> Bool[Tensor, "O I"]:
        from prunekit_kernels import choose

        outputs, inputs = score.shape
        return choose(score, self.groups(outputs, inputs, sparsity))

    @override
    def keep_columns(
        self, score: Float[Tensor, "O C"], start: int, sparsity: float
    ) -> Bool[Tensor, "O C"]:
        from prunekit_kernels import choose

        outputs, columns = score.shape
        return choose(score, self.groups_of_columns(outputs, start, start + columns, sparsity))


def pruned_count(sparsity: float, size: int) -> int:
    """Return how many of ``size`` go: ⌊sparsity · size⌋, as Wanda and SparseGPT count.

    The small addend keeps products such as 0.29 · 100 = 28.999… from losing one.
    """
    return min(size, math.floor(sparsity * size + 1e-6))
