"""Input and output of a pruning method: one linear layer.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Shaped

from prunekit.distributed.ranks import Ranks
from prunekit.patterns import Pattern
from prunekit.statistics import StageStatistics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RowShard:
    """The rows of a layer that this rank prunes.

    Attributes:
        start: Index of its first row.
        total: Rows of the whole layer.
        ranks: The ranks that share the layer.
    """

    start: int
    total: int
    ranks: Ranks


@dataclass(frozen=True)
class Layer:
    """A linear layer to prune.

    Attributes:
        name: Full name in the model, which also seeds random scores.
        weight: [O, I] float32, independent of stored type and layout (Conv1D is transposed).
        stats: The statistics that its method declares in ``needs``, shared by the linears of its
            stage.
        pattern: Which zeros are allowed.
        sparsity: Fraction of zeros, 0..1.
        rows: The rows in ``weight`` if ranks share the layer; None if it has all.
        summarized: Whether statistics of the scores are wanted.
    """

    name: str
    weight: Float[Tensor, "O I"]
    stats: StageStatistics
    pattern: Pattern
    sparsity: float
    rows: RowShard | None = None
    summarized: bool = True

    @property
    def outputs(self) -> int:
        """Output features of the whole layer, over all ranks."""
        return self.rows.total if self.rows else len(self.weight)

    def all_reduce_sum(self, tensor: Shaped[Tensor, ...]) -> None:
        """Sum a tensor over the ranks that share the layer, in place."""
        if self.rows:
            self.rows.ranks.all_reduce_sum(tensor, "thresholds")


@dataclass(frozen=True)
class Pruned:
    """A pruned layer.

    Attributes:
        weight: [O, I], zero wherever ``keep`` is False.
        keep: True where a weight is kept.
        facts: Numbers for the layer's record, such as the damping; under ``score_statistics`` those
            of this rank's rows, a tensor.
    """

    weight: Float[Tensor, "O I"]
    keep: Bool[Tensor, "O I"]
    facts: dict[str, Any] = field(default_factory=dict)
