"""block:RxC, row and column: rectangles of weights are pruned together."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Self

from jaxtyping import Bool
from typing_extensions import override

from prunekit.errors import ConfigError
from prunekit.patterns.base import Grouped, WeightScope, pruned_count

if TYPE_CHECKING:
    from prunekit_kernels import Groups
    from torch import Tensor


class Tiles(Grouped):
    """Rectangular tiles; those with the lowest sums of scores are pruned."""

    spelling: ClassVar[str] = "block:RxC, e.g. block:16x16; row; column"
    stride = None
    tiled = True

    def __init__(self, name: str, rows: int | None, columns: int | None) -> None:
        if rows == 0 or columns == 0:
            raise ConfigError(f'pattern "{name}": a block has at least one row and one column.')
        self.name, self.rows, self.columns = name, rows, columns

    @classmethod
    @override
    def parse(cls, text: str, scope: WeightScope) -> Self | None:
        if text == "row":
            return cls(text, 1, None)
        if text == "column":
            return cls(text, None, 1)
        found = re.fullmatch(r"block:(\d+)x(\d+)", text)
        return cls(text, int(found[1]), int(found[2])) if found else None

    @override
    def why_not_applicable(self, outputs: int, inputs: int) -> str | None:
        if outputs % (self.rows or outputs) == 0 and inputs % (self.columns or inputs) == 0:
            return None
        return (
            f"{self.name} needs outputs and inputs that are multiples of {self.rows} and "
            f"{self.columns}, this layer has {outputs} and {inputs}"
        )

    @override
    def groups(self, outputs: int, inputs: int, sparsity: float) -> Groups:
        from prunekit_kernels import Groups

        rows, columns = tile = self.rows or outputs, self.columns or inputs
        tiles = outputs // rows * (inputs // columns)
        return Groups(None, None, (pruned_count(sparsity, tiles),), tile)

    @override
    def violations(self, keep: Bool[Tensor, "O I"]) -> int:
        tiles = self._tiles(keep)
        return int((tiles.any(3).any(1) != tiles.all(3).all(1)).sum())

    def _tiles(self, matrix: Tensor) -> Tensor:
        outputs, inputs = matrix.shape
        rows, columns = self.rows or outputs, self.columns or inputs
        return matrix.reshape(outputs // rows, rows, inputs // columns, columns)
