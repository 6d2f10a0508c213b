"""Base classes of patterns: which zeros are allowed.

Shapes: O output features, I input features, C columns chosen together.
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

WeightScope = Literal["row", "layer", "block"]
"""Weights whose scores are compared: of a row, of the layer, of a block of 128 columns."""


class Pattern(ABC):
    """A rule that turns scores into a ``keep`` mask with exact counts.

    Attributes:
        name: Spelling in a config, e.g. ``"2:4"``.
        stride: Number of neighbouring columns that :meth:`keep_columns` chooses at a time during a
            column sweep (SparseGPT); None if the whole matrix has to be chosen before.
        spelling: Spelling of this kind of pattern, for messages.
        tiled: Whether scores are summed over weights that are kept or pruned together.
    """

    name: str
    stride: int | None
    spelling: ClassVar[str]
    tiled: bool = False

    @classmethod
    @abstractmethod
    def parse(cls, text: str, scope: WeightScope) -> Self | None:
        """Return the pattern that ``text`` spells; None for another kind."""

    @property
    def sparsity(self) -> float | None:
        """The sparsity fixed by the pattern; None if the user chooses it."""
        return None

    def at(self, sparsity: float) -> Pattern:  # noqa: ARG002  for subclasses
        """Return the pattern for a layer with this sparsity."""
        return self

    def why_not_applicable(self, outputs: int, inputs: int) -> str | None:  # noqa: ARG002  for subclasses
        """Return why the pattern does not fit a shape, or None."""
        return None

    @abstractmethod
    def keep(self, score: Float[Tensor, "O I"], sparsity: float) -> Bool[Tensor, "O I"]:
        """Return the mask of the highest scores.

        Of each group exactly :func:`pruned_count` weights are pruned. Of equal scores the lower
        index is kept; NaN counts as lowest.

        Args:
            score: Higher is kept; any float type.
            sparsity: Fraction of zeros, 0..1; unused if the pattern fixes it.
        """

    def keep_columns(
        self,
        score: Float[Tensor, "O C"],
        start: int,  # noqa: ARG002  for subclasses
        sparsity: float,
    ) -> Bool[Tensor, "O C"]:
        """Return the mask of some columns during a column sweep.

        Args:
            score: Scores of ``stride`` columns, or of the last ones.
            start: Index of their first column in the whole matrix.
            sparsity: Fraction of zeros, 0..1; unused if the pattern fixes it.
        """
        return self.keep(score, sparsity)

    def violations(self, keep: Bool[Tensor, "O I"]) -> int:  # noqa: ARG002  for subclasses
        """Return the number of groups in a mask that violate the pattern."""
        return 0


class Grouped(Pattern):
    """A pattern of exact counts within groups of weights, or of tiles."""

    @abstractmethod
    def groups(self, outputs: int, inputs: int, sparsity: float) -> Groups:
        """Return the groups of a matrix, with their pruned counts.

        Args:
            outputs: Rows of the matrix.
            inputs: Columns of the matrix.
            sparsity: Fraction of zeros, 0..1; unused if the pattern fixes it.
        """

    def groups_of_columns(self, outputs: int, start: int, end: int, sparsity: float) -> Groups:
        """Return the groups of some columns during a column sweep.

        Args:
            outputs: Rows of the matrix.
            start: First column.
            end: Column after the last one.
            sparsity: Fraction of zeros, 0..1; unused if the pattern fixes it.
        """
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
    """Return ⌊sparsity · size⌋, the number of pruned weights.

    Wanda and SparseGPT round down, too. The small addend corrects products such as
    0.29 · 100 = 28.999….
    """
    return min(size, math.floor(sparsity * size + 1e-6))
