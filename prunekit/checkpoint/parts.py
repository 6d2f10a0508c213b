"""Matrices that a checkpoint stores together in one tensor.

A part is named by its position in the tensor, so that the name alone finds it in any copy of the
checkpoint: ``experts.gate_up_proj[3, 0:64:2].T`` are the even ones of the first 64 rows of the
transposed matrix 3.

Shapes: E matrices, O output features, I input features.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

_NAME = re.compile(r"(.+)\[(\d+), (\d+):(\d+):(\d+)\](\.T)?", re.DOTALL)


@dataclass(frozen=True)
class TensorPart:
    """Rows of one matrix of a tensor of several.

    Attributes:
        tensor: Name of the tensor.
        number: Number of the matrix.
        rows: Its rows, outputs first.
        transposed: The tensor stores inputs first.
    """

    tensor: str
    number: int
    rows: range
    transposed: bool = False

    @property
    def name(self) -> str:
        """Name of the part, which no tensor has."""
        rows = f"{self.rows.start}:{self.rows.stop}:{self.rows.step}"
        return f"{self.tensor}[{self.number}, {rows}]{'.T' * self.transposed}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Return the part of a name; None for a whole tensor."""
        if not (found := _NAME.fullmatch(name)):
            return None
        tensor, number, *rows, transposed = found.groups()
        return cls(tensor, int(number), range(*map(int, rows)), transposed is not None)

    def of(self, whole: Tensor) -> Tensor:
        """Return a view of the part, outputs first."""
        matrix = whole[self.number]
        rows = slice(self.rows.start, self.rows.stop, self.rows.step)
        return (matrix.T if self.transposed else matrix)[rows]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the part's shape in a tensor, or None."""
        if len(whole) not in {2, 3} or self.number >= whole[0]:
            return None
        matrix = whole[:0:-1] if self.transposed else whole[1:]
        fits = self.rows.step > 0 and self.rows.stop <= matrix[0]
        return (len(self.rows), *matrix[1:]) if fits else None


def whole_tensors(names: Iterable[str]) -> list[str]:
    """Return the tensors that hold these tensors and parts, each once."""
    parts = ((name, TensorPart.parse(name)) for name in names)
    return list(dict.fromkeys(part.tensor if part else name for name, part in parts))


def find_part(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return a tensor, or part of one, by name, or None."""
    part = TensorPart.parse(name)
    whole = tensors.get(part.tensor if part else name)
    return part.of(whole) if part and whole is not None else whole


def put_parts(tensors: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in which some, or parts of some, are replaced.

    Args:
        tensors: Whole tensors, which are not changed.
        changed: Tensors and parts by name.
    """
    found = {**tensors}
    for name, value in changed.items():
        part = TensorPart.parse(name)
        if part is None:
            found[name] = value
            continue
        if found[part.tensor] is tensors.get(part.tensor):
            found[part.tensor] = tensors[part.tensor].clone()
        part.of(found[part.tensor]).copy_(value)
    return found
