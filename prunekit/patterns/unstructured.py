"""Unstructured: any weight may go."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from typing_extensions import override

from prunekit.patterns.base import Grouped, Scope, pruned_count

if TYPE_CHECKING:
    from prunekit_kernels import Groups

BLOCK_COLUMNS = 128
"""Columns that SparseGPT compares with each other (arXiv:2301.00774, §3.3)."""


class Unstructured(Grouped):
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
        gone = pruned_count(sparsity, size * end) - pruned_count(sparsity, size * start)
        return Groups(rows, None, (gone,))
