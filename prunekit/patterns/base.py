"""Which zeros are allowed.

Shapes: O output features, I input features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from jaxtyping import Bool, Float

if TYPE_CHECKING:
    from torch import Tensor

Scope = Literal["row", "layer", "block"]


class Pattern(ABC):
    """A rule that turns scores into a ``keep`` mask with exact counts.

    Attributes:
        name: How the pattern is written in a config, e.g. ``"2:4"``.
        stride: How many neighbouring columns are chosen together, by :meth:`keep_columns`, while a
            column sweep (SparseGPT) moves over the weight; None when the whole matrix has to be
            chosen before.
        n_of_m: (n, m) where n of every m neighbours in a row stay and nothing else counts: a sweep
            then chooses by itself, without :meth:`keep_columns`.
    """

    name: str
    stride: int | None
    n_of_m: tuple[int, int] | None = None
    spelling: ClassVar[str]

    @classmethod
    @abstractmethod
    def parse(cls, text: str, scope: Scope) -> Self | None:
        """Return the pattern that ``text`` spells, or None if it is another kind."""

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the pattern itself fixes, or None if the user says it."""
        return None

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


def pruned_count(sparsity: float, size: int) -> int:
    """Return how many of ``size`` go: ⌊sparsity · size⌋, as Wanda and SparseGPT count.

    The small addend keeps products such as 0.29 · 100 = 28.999… from losing one.
    """
    return min(size, math.floor(sparsity * size + 1e-6))
