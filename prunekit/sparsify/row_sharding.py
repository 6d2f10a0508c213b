"""Patterns of a layer whose rows are spread over ranks.

Shapes: O output features of this rank, I input features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from jaxtyping import Bool, Float
from typing_extensions import override

from prunekit.distributed.ranks import Ranks
from prunekit.patterns import Grouped, Pattern, Scope

if TYPE_CHECKING:
    from prunekit_kernels import Groups
    from torch import Tensor


def row_shards(pattern: Pattern, ranks: Ranks, outputs: int, inputs: int) -> list[slice] | None:
    """Return which rows each rank prunes, or None where each prunes all of them.

    So it is where there are fewer tiles, one above the other, than ranks, and for a pattern that is
    not counted within groups, of which nothing is known.
    """
    if not ranks.is_distributed or not isinstance(pattern, Grouped):
        return None
    height = pattern.groups(outputs, inputs, 0.0).tile[0]
    unit = 1 if height == outputs else height
    return ranks.shards(outputs, unit) if outputs // unit >= ranks.size else None


def shard_pattern(pattern: Pattern, ranks: Ranks, outputs: int, inputs: int) -> Pattern:
    """Return the pattern that chooses among the rows of all ranks; its own if rows do not mix."""
    assert isinstance(pattern, Grouped)
    if pattern.groups(outputs, inputs, 0.0).rows == 1:
        return pattern
    return ShardedPattern(pattern, ranks, outputs)


class ShardedPattern(Pattern):
    """A pattern whose masks are found by counting over all ranks, each of which holds some rows."""

    spelling = "none: it is not written, but made of one that is"

    def __init__(self, whole: Grouped, ranks: Ranks, outputs: int) -> None:
        self.name, self.stride, self.tiled = whole.name, whole.stride, whole.tiled
        self._whole, self._ranks, self._outputs = whole, ranks, outputs

    @classmethod
    @override
    def parse(cls, text: str, scope: Scope) -> Self | None:
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
        others = PeerRows(
            ranks.rank,
            ranks.size,
            self._outputs,
            lambda counts: ranks.all_reduce_sum(counts, "thresholds"),
        )
        return choose_spread(score, groups, others)
