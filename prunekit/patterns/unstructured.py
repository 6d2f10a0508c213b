"""Unstructured: any weight may be pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from typing_extensions import override

from prunekit.patterns.base import Grouped, WeightScope, pruned_count

if TYPE_CHECKING:
    from prunekit_kernels import Groups

BLOCK_COLUMNS = 128
"""Columns whose weights SparseGPT compares with each other (arXiv:2301.00774, §3.3)."""


class Unstructured(Grouped):
    """Single weights; those with the lowest scores of each group are pruned.

    A group is a row, the whole layer, or a block of 128 columns.
    """

    spelling: ClassVar[str] = "unstructured"

    def __init__(self, scope: WeightScope = "row") -> None:
        self.name = "unstructured"
        self.scope: WeightScope = scope
        self.stride = None if scope == "layer" else BLOCK_COLUMNS

    @classmethod
    @override
    def parse(cls, text: str, scope: WeightScope) -> Self | None:
        return cls(scope) if text == "unstructured" else None

    @override
    def groups(self, outputs: int, inputs: int, sparsity: float) -> Groups:
        from prunekit_kernels import Groups

        if self.scope != "block":
            return self.groups_of_columns(outputs, 0, inputs, sparsity)
        windows = (
            self.groups_of_columns(outputs, start, min(start + BLOCK_COLUMNS, inputs), sparsity)
            for start in range(0, inputs, BLOCK_COLUMNS)
        )
        return Groups(None, BLOCK_COLUMNS, tuple(window.pruned[0] for window in windows))

    @override
    def groups_of_columns(self, outputs: int, start: int, end: int, sparsity: float) -> Groups:
        from prunekit_kernels import Groups

        # The counts of the windows add up to exactly the count of the whole.
        rows, size = (1, 1) if self.scope == "row" else (None, outputs)
        pruned = pruned_count(sparsity, size * end) - pruned_count(sparsity, size * start)
        return Groups(rows, None, (pruned,))
