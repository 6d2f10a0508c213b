"""Groups of weights that compete, each with a count to prune."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

NEIGHBOURS = 64  # most columns of a group within a row: they are compared pairwise


@dataclass(frozen=True)
class Groups:
    """Groups of a matrix: neighbours in a row, columns, or everything.

    Attributes:
        rows: Rows of a group: 1, or None for all.
        columns: Columns of a group, None for all; the last group of whole columns may have fewer.
        pruned: How many units of a group are pruned: one number for all groups of single rows,
            otherwise one for each group.
        tile: Rows and columns of a unit, whose score is the sum over it, in float64. Only where the
            whole matrix is one group.
    """

    rows: int | None
    columns: int | None
    pruned: tuple[int, ...]
    tile: tuple[int, int] = (1, 1)

    def check(self, outputs: int, inputs: int) -> None:
        """Check that the groups divide a matrix of this shape.

        Raises:
            ValueError: The tiles or groups do not divide the matrix, or the counts do not match the
                number of groups.
        """
        if reason := self._mismatch(outputs, inputs):
            raise ValueError(f"{self} of a matrix of shape {(outputs, inputs)}: {reason}")

    def _mismatch(self, outputs: int, inputs: int) -> str | None:
        if self.tile != (1, 1):
            fits = outputs % self.tile[0] == 0 and inputs % self.tile[1] == 0
            return None if fits else "tiles have to divide it"
        if self.rows is None:
            groups = -(-inputs // (self.columns or max(inputs, 1))) if inputs else 0
            enough = len(self.pruned) in (groups, max(groups, 1))
            return None if enough else f"{groups} groups need as many counts"
        if self.rows != 1 or len(self.pruned) != 1:
            return "groups have one row and one count, or all rows"
        if self.columns is not None and (self.columns > NEIGHBOURS or inputs % self.columns):
            return f"neighbours have to divide it, {NEIGHBOURS} at most"
        return None

    def numbers(self) -> list[int]:
        """Return the fields as integers, for an operator; :meth:`of` is the inverse."""
        return [self.rows or 0, self.columns or 0, *self.tile, *self.pruned]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Self:
        """Return the groups that :meth:`numbers` encoded."""
        rows, columns, height, width, *pruned = numbers
        return cls(rows or None, columns or None, tuple(pruned), (height, width))
