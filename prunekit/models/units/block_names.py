"""Names of the tensors of a model with fewer blocks.

The kept blocks are renumbered, in the model and in its files. A name in the files can differ from
the one in the model, and may hold more numbers than that of the block, such as those of experts:
the number of the block is the first one that agrees with the block of every tensor whose name
begins alike.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prunekit.errors import ShapeError
from prunekit.models.units.base import Kept
from prunekit.models.units.block_entries import new_number
from prunekit.models.units.blocks import BlockGroup, shared_biases

NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.)")
"""A number between the dots of a name."""


class Source(NamedTuple):
    """Where a tensor of the smaller checkpoint comes from.

    Attributes:
        stored: Its name in the files of the whole model.
        name: Its name in the smaller model; None for a tensor that no module has.
    """

    stored: str
    name: str | None


def tensor_sources(
    groups: Sequence[BlockGroup], kept: Kept, stored: Mapping[str, str], names: Iterable[str]
) -> dict[str, Source]:
    """Return the source of each tensor of the smaller checkpoint.

    Keys are the names in its files. Tensors that no module has are kept, except those of removed
    blocks.

    Args:
        groups: The lists of blocks of the whole model; none if no block is removed.
        kept: Kept blocks of each list.
        stored: Name in the files of each tensor of the whole model.
        names: Names of all tensors in the files of the whole model.

    Raises:
        ShapeError: The names in the files do not hold the numbers of the blocks.
    """
    rules = [_Renumbering(group, kept[group.name], stored) for group in groups]
    sources = {}
    for name, file_name in stored.items():
        rule = next((each for each in rules if name in each.inside), None)
        new = rule.in_model(name) if rule else name
        new_file_name = rule.in_files(file_name) if rule else file_name
        if new is not None and new_file_name is not None:
            sources[new_file_name] = Source(file_name, new)
    for file_name in sorted({*names} - {*stored.values()}):
        moved: str | None = file_name
        for rule in rules:
            moved = moved and rule.in_files(moved)
        if moved is not None:
            sources[moved] = Source(file_name, None)
    return sources


class _Renumbering:
    """New names of the tensors in one list of blocks.

    Attributes:
        inside: Names of the model's tensors that move with a block.
    """

    def __init__(self, group: BlockGroup, keep: Sequence[int], stored: Mapping[str, str]) -> None:
        self._group, self._keep = group, keep
        # These are always in the first block.
        shared = {f"{group.name}.0.{path}.{name}.weight" for path, name in shared_biases(group)}
        self.inside = {name for name in stored if name.startswith(f"{group.name}.")} - shared
        self._prefixes = self._find_prefixes({name: stored[name] for name in self.inside})

    def in_model(self, name: str) -> str | None:
        """Return the new name of a tensor in the model.

        None if its block is removed.
        """
        return self._renumber(name, f"{self._group.name}.")

    def in_files(self, name: str) -> str | None:
        """Return the new name of a tensor in the files.

        None if its block is removed.
        """
        prefix = next((part for part, _ in _numbers(name) if part in self._prefixes), None)
        return name if prefix is None else self._renumber(name, prefix)

    def _renumber(self, name: str, prefix: str) -> str | None:
        number, dot, rest = name.removeprefix(prefix).partition(".")
        new = new_number(int(number), self._keep, self._group.units)
        return None if new is None else f"{prefix}{new}{dot}{rest}"

    def _find_prefixes(self, inside: Mapping[str, str]) -> set[str]:
        """Return the beginnings of stored names after which the block's number follows."""
        agrees: dict[str, bool] = {}
        for name, file_name in inside.items():
            block = int(name.removeprefix(f"{self._group.name}.").partition(".")[0])
            for prefix, number in _numbers(file_name):
                agrees[prefix] = agrees.get(prefix, True) and number == block
        found = set()
        for name, file_name in inside.items():
            prefix = next((part for part, _ in _numbers(file_name) if agrees[part]), None)
            if prefix is None:
                raise ShapeError(
                    f"{self._group.name}: the files store {name} as {file_name}, which does not "
                    "hold the number of its block, so blocks cannot be renumbered there. Open the "
                    "model with transformers and save it again."
                )
            found.add(prefix)
        return found


def _numbers(name: str) -> Iterator[tuple[str, int]]:
    """Yield each number in a name with all that comes before it."""
    for match in NUMBER.finditer(name):
        yield name[: match.start()], int(match[0])
