"""block:RxC, row and column: rectangles of weights go together."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, ClassVar, Self

from jaxtyping import Bool, Float
from typing_extensions import override

from prunekit.errors import ConfigError
from prunekit.patterns.base import Pattern, Scope, pruned_count
from prunekit.patterns.selection import keep_highest

if TYPE_CHECKING:
    from torch import Tensor


class Tiles(Pattern):
    """The rectangles with the lowest sum of scores in the layer go, whole."""

    spelling: ClassVar[str] = "block:RxC, e.g. block:16x16; row; column"
    stride = None

    def __init__(self, name: str, rows: int | None, columns: int | None) -> None:
        if rows == 0 or columns == 0:
            raise ConfigError(f'pattern "{name}": a block has at least one row and one column.')
        self.name, self.rows, self.columns = name, rows, columns

    @classmethod
    @override
    def parse(cls, text: str, scope: Scope) -> Self | None:
        if text == "row":
            return cls(text, 1, None)
        if text == "column":
            return cls(text, None, 1)
        found = re.fullmatch(r"block:(\d+)x(\d+)", text)
        return cls(text, int(found[1]), int(found[2])) if found else None

    @override
    def misfit(self, outputs: int, inputs: int) -> str | None:
        if outputs % (self.rows or outputs) == 0 and inputs % (self.columns or inputs) == 0:
            return None
        return (
            f"{self.name} needs outputs and inputs that are multiples of {self.rows} and "
            f"{self.columns}, this layer has {outputs} and {inputs}"
        )

    @override
    def keep(self, score: Float[Tensor, "O I"], sparsity: float) -> Bool[Tensor, "O I"]:
        tiles = self._tiles(score.nan_to_num(nan=-math.inf, posinf=math.inf))
        total = tiles.double().sum((1, 3))
        kept = keep_highest(
            total.reshape(1, -1), total.numel() - pruned_count(sparsity, total.numel())
        ).view(total.shape)
        return kept[:, None, :, None].expand(tiles.shape).reshape(score.shape)

    @override
    def violations(self, keep: Bool[Tensor, "O I"]) -> int:
        tiles = self._tiles(keep)
        return int((tiles.any(3).any(1) != tiles.all(3).all(1)).sum())

    def _tiles(self, matrix: Tensor) -> Tensor:
        outputs, inputs = matrix.shape
        rows, columns = self.rows or outputs, self.columns or inputs
        return matrix.reshape(outputs // rows, rows, inputs // columns, columns)
