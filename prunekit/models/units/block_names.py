"""Names of the tensors of a model with fewer blocks or experts.

The kept ones are renumbered, in the model and in its files. A name in the files can differ from the
one in the model, and may hold more numbers, such as those of experts in a block: the number of the
block is the first one that agrees with the block of every tensor whose name begins alike, and that
of an expert likewise. Files may also store the matrices of all experts in one tensor.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from prunekit.checkpoint.parts import TensorPart, joined_name, single_names
from prunekit.errors import ShapeError
from prunekit.models.units.base import Kept, UnitGroup
from prunekit.models.units.block_entries import new_number
from prunekit.models.units.blocks import BlockGroup, shared_biases

NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.)")
"""A number between the dots of a name."""


class Source(NamedTuple):
    """Where a tensor of the smaller checkpoint comes from.

    Attributes:
        stored: Its name in the files of the whole model.
        name: Its name in the smaller model; None for a tensor that no module has.
        matrices: Of a tensor with a matrix for each expert the kept ones, and their number before.
    """

    stored: str
    name: str | None
    matrices: tuple[tuple[int, ...], int] | None = None

    def of(self, whole: Tensor) -> Tensor:
        """Return the kept matrices of the tensor in the files."""
        if self.matrices is None:
            return whole
        keep, count = self.matrices
        rows = torch.arange(len(whole)).view(count, -1)[[*keep]]
        return whole.index_select(0, rows.flatten())

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of :meth:`of`."""
        if self.matrices is None:
            return whole
        keep, count = self.matrices
        return (whole[0] // count * len(keep), *whole[1:])


def tensor_sources(
    groups: Sequence[UnitGroup], kept: Kept, stored: Mapping[str, str], names: Iterable[str]
) -> dict[str, Source]:
    """Return the source of each tensor of the smaller checkpoint.

    Keys are the names in its files. Tensors that no module has are kept, except those of removed
    blocks and experts.

    Args:
        groups: The groups of the whole model whose units are numbered in names: the lists of its
            blocks, or its experts; none if neither are removed.
        kept: Kept units of each group.
        stored: Name in the files of each tensor of the whole model.
        names: Names of all tensors in the files of the whole model.

    Raises:
        ShapeError: The names in the files do not hold the numbers of the units.
    """
    rules = [_Renumbering(group, kept[group.name], stored) for group in groups]
    sources = {}
    for name, file_name in stored.items():
        rule = next((each for each in rules if name in each.inside), None)
        new = rule.in_model(name) if rule else name
        new_file_name = rule.in_files(file_name) if rule else file_name
        if new is not None and new_file_name is not None:
            sources[new_file_name] = Source(file_name, new)
    matrices = {name: rule.matrices for rule in rules for name in rule.tensors}
    for file_name in sorted({*names} - {*stored.values()}):
        moved: str | None = file_name
        for rule in rules:
            moved = moved and rule.in_files(moved)
        if moved is not None:
            sources[moved] = Source(file_name, None, matrices.get(file_name))
    return sources


class _Renumbering:
    """New names of tensors in a list of blocks or experts.

    Attributes:
        inside: Names of the model's tensors that move with a unit.
        tensors: Tensors in the files with a matrix for each unit.
    """

    def __init__(self, group: UnitGroup, keep: Sequence[int], stored: Mapping[str, str]) -> None:
        self._group, self._keep = group, keep
        shared: set[str] = set()
        if isinstance(group, BlockGroup):  # these are always in the first block
            shared = {f"{group.name}.0.{path}.{name}.weight" for path, name in shared_biases(group)}
        self.inside = {name for name in stored if name.startswith(f"{group.name}.")} - shared
        self.tensors: set[str] = set()
        self._prefixes = self._find_prefixes({name: stored[name] for name in self.inside})

    @property
    def matrices(self) -> tuple[tuple[int, ...], int]:
        """The kept units, and their number before."""
        return (*self._keep,), self._group.units

    def in_model(self, name: str) -> str | None:
        """Return the new name of a tensor in the model.

        None if its unit is removed.
        """
        return self._renumber(name, f"{self._group.name}.")

    def in_files(self, name: str) -> str | None:
        """Return the new name of tensors in the files.

        None if its unit is removed.
        """
        moved = [self._single(each) for each in single_names(name)]
        found = [each for each in moved if each is not None]
        return joined_name(found) if len(found) == len(moved) else None

    def _single(self, name: str) -> str | None:
        part = TensorPart.parse(name)
        if part and part.tensor in self.tensors:
            number = new_number(part.number, self._keep, self._group.units)
            count = len(self._keep) if part.count else 0
            return None if number is None else replace(part, number=number, count=count).name
        prefix = next((part for part, _ in _numbers(name) if part in self._prefixes), None)
        return name if prefix is None else self._renumber(name, prefix)

    def _renumber(self, name: str, prefix: str) -> str | None:
        number, dot, rest = name.removeprefix(prefix).partition(".")
        new = new_number(int(number), self._keep, self._group.units)
        return None if new is None else f"{prefix}{new}{dot}{rest}"

    def _find_prefixes(self, inside: Mapping[str, str]) -> set[str]:
        """Return the beginnings of stored names after which the unit's number follows."""
        agrees: dict[str, bool] = {}
        for name, file_name in inside.items():
            for prefix, number in _numbers(file_name):
                agrees[prefix] = agrees.get(prefix, True) and number == self._unit(name)
        found = set()
        for name, file_name in inside.items():
            prefix = next((part for part, _ in _numbers(file_name) if agrees[part]), None)
            part = TensorPart.parse(file_name)
            if prefix is not None:
                found.add(prefix)
            elif part and part.number == self._unit(name):
                self.tensors.add(part.tensor)
            else:
                raise ShapeError(
                    f"{self._group.name}: the files store {name} as {file_name}, which does not "
                    f"hold the number of its {self._group.kind.removesuffix('s')}, so "
                    f"{self._group.kind} cannot be renumbered there. Open the model with "
                    "transformers and save it again."
                )
        return found

    def _unit(self, name: str) -> int:
        return int(name.removeprefix(f"{self._group.name}.").partition(".")[0])


def _numbers(name: str) -> Iterator[tuple[str, int]]:
    """Yield each number in a name with all that comes before it."""
    for match in NUMBER.finditer(name):
        yield name[: match.start()], int(match[0])
