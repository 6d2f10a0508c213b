"""Rows of linears split over ranks, and patterns across ranks.

Shapes: O output features of this rank, N of all ranks, I input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from jaxtyping import Bool, Float
from typing_extensions import override

from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.methods.layer import RowShard
from prunekit.models.layout import Linear, read_weight
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.patterns import Grouped, Pattern, WeightScope

if TYPE_CHECKING:
    from prunekit_kernels import Groups
    from torch import Tensor


def row_shards(pattern: Pattern, ranks: Ranks, outputs: int, inputs: int) -> list[slice] | None:
    """Return the rows that each rank prunes; None if each prunes all.

    Each prunes all where the pattern has fewer tiles, one above the other, than there are ranks,
    and where it does not choose within groups, so that nothing is known about it.

    Args:
        pattern: The pattern of the weight.
        ranks: The processes that share the rows.
        outputs: Rows of the weight.
        inputs: Columns of the weight.
    """
    if not ranks.is_distributed or not isinstance(pattern, Grouped):
        return None
    height = pattern.groups(outputs, inputs, 0.0).tile[0]
    unit = 1 if height == outputs else height
    return ranks.shards(outputs, unit) if outputs // unit >= ranks.size else None


def shard_pattern(pattern: Pattern, ranks: Ranks, outputs: int, inputs: int) -> Pattern:
    """Return a pattern that chooses among the rows of all ranks.

    It is the pattern itself if that chooses within rows.

    Args:
        pattern: The pattern of the whole weight.
        ranks: The processes that share the rows.
        outputs: Rows of the weight, on all ranks together.
        inputs: Columns of the weight.
    """
    assert isinstance(pattern, Grouped)
    if pattern.groups(outputs, inputs, 0.0).rows == 1:
        return pattern
    return ShardedPattern(pattern, ranks, outputs)


@dataclass(frozen=True)
class ShardedLinear:
    """A linear of which this rank prunes some rows.

    Attributes:
        linear: The linear.
        shards: Rows of each rank; None if each prunes all.
        ranks: The processes that share the rows.
    """

    linear: Linear
    shards: list[slice] | None
    ranks: Ranks

    @property
    def rows(self) -> slice:
        """Rows that this rank prunes."""
        return self.shards[self.ranks.rank] if self.shards else slice(None)

    @property
    def sharing(self) -> Ranks:
        """Ranks over which sums over rows are reduced."""
        return self.ranks if self.shards else SINGLE

    def read(self, loaded: LoadedBlock) -> Float[Tensor, "O I"]:
        """Return a float32 copy of this rank's rows of the weight."""
        return read_weight(loaded.module, self.linear, self.rows, loaded.checks)

    def gather(self, own: Float[Tensor, "O I"], purpose: str = "rows") -> Float[Tensor, "N I"]:
        """Return the rows of all ranks, given this rank's and their purpose."""
        return self.ranks.all_gather_rows(own, self.shards, purpose) if self.shards else own

    def shard(self, pattern: Pattern) -> tuple[Pattern, RowShard | None]:
        """Return the pattern for this rank's rows, and these; None for all."""
        if self.shards is None:
            return pattern, None
        linear = self.linear
        sharded = shard_pattern(pattern, self.ranks, linear.outputs, linear.inputs)
        return sharded, RowShard(self.rows.start, linear.outputs, self.ranks)


class ShardedPattern(Pattern):
    """A pattern that chooses among the rows of all ranks."""

    spelling = "none: made from a pattern of the config, never written in one"

    def __init__(self, whole: Grouped, ranks: Ranks, outputs: int) -> None:
        self.name, self.stride, self.tiled = whole.name, whole.stride, whole.tiled
        self._whole, self._ranks, self._outputs = whole, ranks, outputs

    @classmethod
    @override
    def parse(cls, text: str, scope: WeightScope) -> Self | None:
        return None

    @override
    def keep(self, score: Float[Tensor, "O I"], sparsity: float) -> Bool[Tensor, "O I"]:
        return self._choose(score, self._whole.groups(self._outputs, score.shape[1], sparsity))

    @override
    def keep_columns(
        self, score: Float[Tensor, "O C"], start: int, sparsity: float
    ) -> Bool[Tensor, "O C"]:
        end = start + score.shape[1]
        groups = self._whole.groups_of_columns(self._outputs, start, end, sparsity)
        return self._choose(score, groups)

    def _choose(self, score: Tensor, groups: Groups) -> Tensor:
        from prunekit_kernels import PeerRows, choose_spread

        ranks = self._ranks
        peers = PeerRows(
            ranks.rank,
            ranks.size,
            self._outputs,
            lambda counts: ranks.all_reduce_sum(counts, "thresholds"),
        )
        return choose_spread(score, groups, peers)
