"""Parts of tensors, and tensors that are one matrix together.

A checkpoint may store several matrices in one tensor, or one matrix in several tensors. Both are
named by their position in the tensors, so that the name alone finds them in any copy of
the checkpoint: ``experts.gate_up_proj[3, 0:64:2].T`` are the even ones of the first 64 rows of the
transposed matrix 3; ``Wqkv.weight[1/3, 0:32:1]`` are the first 32 rows of the second third;
``gate_proj.weight + up_proj.weight`` are all rows of the one, then all rows of the other.

Shapes: E matrices, O output features, I input features.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_NAME = re.compile(r"(.+)\[(\d+)(?:/(\d+))?, (\d+):(\d+):(\d+)\](\.T)?", re.DOTALL)
_JOIN = " + "


@dataclass(frozen=True)
class TensorPart:
    """Rows of one matrix of a tensor of several.

    Attributes:
        tensor: Name of the tensor.
        number: Number of the matrix.
        rows: Its rows, outputs first.
        transposed: The tensor stores inputs first.
        count: Number of matrices of equal height that are stacked in the first dimension; 0 where
            that dimension numbers them.
    """

    tensor: str
    number: int
    rows: range
    transposed: bool = False
    count: int = 0

    @property
    def name(self) -> str:
        """Name of the part, which no tensor has."""
        rows = f"{self.rows.start}:{self.rows.stop}:{self.rows.step}"
        number = f"{self.number}/{self.count}" if self.count else f"{self.number}"
        return f"{self.tensor}[{number}, {rows}]{'.T' * self.transposed}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Return the part of a name; None for a whole tensor."""
        if not (found := _NAME.fullmatch(name)):
            return None
        tensor, number, count, *rows, transposed = found.groups()
        span = range(*map(int, rows))
        return cls(tensor, int(number), span, transposed is not None, int(count or 0))

    def of(self, whole: Tensor) -> Tensor:
        """Return a view of the part, outputs first."""
        matrix = (whole.unflatten(0, (self.count, -1)) if self.count else whole)[self.number]
        rows = slice(self.rows.start, self.rows.stop, self.rows.step)
        return (matrix.T if self.transposed else matrix)[rows]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the part's shape in a tensor, or None."""
        if self.count:
            if not whole or whole[0] % self.count:
                return None
            whole = (self.count, whole[0] // self.count, *whole[1:])
        if len(whole) not in {2, 3} or self.number >= whole[0]:
            return None
        matrix = whole[:0:-1] if self.transposed else whole[1:]
        fits = self.rows.step > 0 and self.rows.stop <= matrix[0]
        return (len(self.rows), *matrix[1:]) if fits else None


def joined_name(names: Iterable[str]) -> str:
    """Return the name of tensors that are one below the other."""
    return _JOIN.join(names)


def single_names(name: str) -> list[str]:
    """Return the names that a name joins, or it alone."""
    return name.split(_JOIN)


def joined_shape(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape of tensors one below the other, or None."""
    first, *others = shapes
    if not first or any(shape[1:] != first[1:] or not shape for shape in others):
        return None
    return (sum(shape[0] for shape in (first, *others)), *first[1:])


def is_whole(name: str) -> bool:
    """Return whether a name is that of one whole tensor."""
    return _JOIN not in name and TensorPart.parse(name) is None


def whole_tensors(names: Iterable[str]) -> list[str]:
    """Return the tensors that hold these tensors and parts, each once."""
    single = (each for name in names for each in single_names(name))
    parts = ((name, TensorPart.parse(name)) for name in single)
    return list(dict.fromkeys(part.tensor if part else name for name, part in parts))


def find_part(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return a tensor, a part, or joined tensors by name, or None."""
    if _JOIN in name:
        found = [tensors[each] for each in name.split(_JOIN) if each in tensors]
        return torch.cat(found) if len(found) == len(name.split(_JOIN)) else None
    part = TensorPart.parse(name)
    whole = tensors.get(part.tensor if part else name)
    return part.of(whole) if part and whole is not None else whole


def put_parts(tensors: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in which some, or parts of some, are replaced.

    Args:
        tensors: Whole tensors, which are not changed.
        changed: Tensors, parts and joined tensors by name.
    """
    found = {**tensors}
    for name, value in changed.items():
        part = TensorPart.parse(name)
        if _JOIN in name:
            names = name.split(_JOIN)
            pieces = value.split([len(tensors[each]) for each in names])
            found |= zip(names, map(torch.clone, pieces), strict=True)
        elif part is None:
            found[name] = value
        else:
            if found[part.tensor] is tensors.get(part.tensor):
                found[part.tensor] = tensors[part.tensor].clone()
            part.of(found[part.tensor]).copy_(value)
    return found
