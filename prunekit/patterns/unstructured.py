"""Unstructured: any weight may go."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from jaxtyping import Bool, Float
from typing_extensions import override

from prunekit.patterns.base import Pattern, Scope, pruned_count
from prunekit.patterns.selection import keep_highest

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_COLUMNS = 128
"""Columns that SparseGPT compares with each other (arXiv:2301.00774, §3.3)."""


class Unstructured(Pattern):
    """The lowest scores of each row, of the whole layer, or of each block of 128 columns go."""

    spelling: ClassVar[str] = "unstructured"

    def __init__(self, scope: Scope = "row") -> None:
        self.name = "unstructured"
        self.scope: Scope = scope
        self.stride = None if scope == "layer" else BLOCK_COLUMNS

    @classmethod
    @override
    def parse(cls, text: str, scope: Scope) -> Self | None:
        return cls(scope) if text == "unstructured" else None

    @override
    def keep(self, score: Float[Tensor, "O I"], sparsity: float) -> Bool[Tensor, "O I"]:
        if self.scope == "row":
            return _without_lowest(score, pruned_count(sparsity, score.shape[1]))
        if self.scope == "layer":
            flat = score.reshape(1, -1)
            return _without_lowest(flat, pruned_count(sparsity, flat.shape[1])).view(score.shape)
        keep = score > 0
        for start in range(0, score.shape[1], BLOCK_COLUMNS):
            window = slice(start, start + BLOCK_COLUMNS)
            keep[:, window] = self.keep_columns(score[:, window], start, sparsity)
        return keep

    @override
    def keep_columns(
        self, score: Float[Tensor, "O C"], start: int, sparsity: float
    ) -> Bool[Tensor, "O C"]:
        # The counts of the windows add up to exactly the count of the whole.
        groups = score if self.scope == "row" else score.reshape(1, -1)
        scale = 1 if self.scope == "row" else score.shape[0]
        end = start + score.shape[1]
        gone = pruned_count(sparsity, scale * end) - pruned_count(sparsity, scale * start)
        return _without_lowest(groups, gone).view(score.shape)


def _without_lowest(score: Tensor, pruned: int) -> Tensor:
    return keep_highest(score, score.shape[1] - pruned)
