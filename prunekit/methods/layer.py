"""One linear layer as the methods see it, and what they give back.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float, Shaped

from prunekit.distributed.ranks import Ranks
from prunekit.patterns import Pattern
from prunekit.statistics import StageStatistics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of a layer: from ``start`` on, of ``total``; ``ranks`` have the others."""

    start: int
    total: int
    ranks: Ranks


@dataclass(frozen=True)
class Layer:
    """A linear layer to prune.

    Attributes:
        name: Full name in the model, which also seeds what is random.
        weight: [O, I] float32, whatever the stored type or layout (Conv1D is transposed before).
        stats: What its method declared in ``needs``; shared by the linears of its stage.
        pattern: Which zeros are allowed.
        sparsity: Fraction of zeros, 0..1.
        rows: Which rows ``weight`` has, where other ranks have the others; None for all.
    """

    name: str
    weight: Float[Tensor, "O I"]
    stats: StageStatistics
    pattern: Pattern
    sparsity: float
    rows: Rows | None = None

    @property
    def outputs(self) -> int:
        """Output features of the layer, wherever its rows are."""
        return self.rows.total if self.rows else len(self.weight)

    def add(self, tensor: Shaped[Tensor, ...]) -> None:
        """Add up, in place, what the rows of this rank and those of the others give."""
        if self.rows:
            self.rows.ranks.all_reduce_sum(tensor, "thresholds")


@dataclass(frozen=True)
class Pruned:
    """A pruned layer: ``weight`` is zero wherever ``keep`` is False; ``facts`` go to the record."""

    weight: Float[Tensor, "O I"]
    keep: Bool[Tensor, "O I"]
    facts: dict[str, float] = field(default_factory=dict)
