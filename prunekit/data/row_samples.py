"""Inputs made row by row, of images or sound with text.

Shapes: T tokens.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from prunekit.data.rows import json_rows
from prunekit.data.sources import JSON_LINES, title
from prunekit.errors import ConfigError

Row = TypeVar("Row")
SHOWN = 200
"""Characters of a path that an error shows."""


def first_row_has(source: str, key: str) -> bool:
    """Return whether a JSON lines file begins with a certain key.

    Raises:
        ConfigError: The file cannot be read, or its first row is not JSON.
    """
    if not source.endswith(JSON_LINES):
        return False
    try:
        row = next((row for _, row in json_rows(source)), None)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror or error}") from error
    return isinstance(row, dict) and key in row


def named_file(source: str, name: str, where: str) -> Path:
    """Return the file that a row names, relative to its own.

    It may lie outside of that folder.

    Args:
        source: The file of the row.
        name: The path.
        where: Place of the row, for messages.

    Raises:
        ConfigError: There is no such file.
    """
    path = Path(source).parent / name
    # Unlike the method of Path, this does not raise on names that no file can have.
    if not os.path.isfile(path):  # noqa: PTH113
        shown = name if len(name) <= SHOWN else f"{name[:SHOWN]}…"
        raise ConfigError(f"{where}: {str(Path(source).parent / shown)!r}: no such file")
    return path


@dataclass(frozen=True)
class RowSamples:
    """Inputs for rows of images or sound with text, batched alone.

    Attributes:
        rows: Inputs by name, of one row each; ``input_ids`` [1, T] among them.
        description: Source and number of rows, for reports.
    """

    rows: Sequence[dict[str, Tensor]]
    description: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, shapes and bytes of all inputs."""
        found = hashlib.sha256()
        for row in self.rows:
            for name, value in sorted(row.items()):
                found.update(f"{name} {value.dtype} {[*value.shape]}".encode())
                found.update(value.contiguous().numpy().data)
        return found.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Numbers of tokens of the rows, those of an image included."""
        return [row["input_ids"].shape[1] for row in self.rows]

    @property
    def tokens(self) -> int:
        """Number of tokens of all rows."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Largest number of tokens of a row."""
        return max(self.lengths)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all inputs."""
        return sum(value.nbytes for row in self.rows for value in row.values())

    def even_batches(self, tokens: int, share: slice | None = None) -> list[dict[str, Tensor]]:
        """Return batches of one row, whatever ``tokens`` allows; ``share``: the rows."""
        del tokens
        return [*self.rows[share or slice(None)]]

    batches = even_batches  # none is padded


def sample_rows(
    rows: Sequence[Row],
    inputs_of: Callable[[Row], dict[str, Tensor]],
    sources: Sequence[str],
    count: int,
    length: int,
    seed: int,
) -> RowSamples:
    """Return the inputs of rows chosen at random, at most ``count``.

    Longer rows are left out, and others chosen for them; the description says so.

    Args:
        rows: All rows.
        inputs_of: Returns the inputs of a row.
        sources: Names of the files, for messages.
        count: Number of rows to return at most.
        length: Most tokens of a row.
        seed: Seed of the choice.

    Raises:
        ConfigError: All rows are longer.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[dict[str, Tensor]] = []
    longer: list[int] = []
    for number in torch.randperm(len(rows), generator=generator).tolist():
        if len(found) == count:
            break
        inputs = inputs_of(rows[number])
        tokens = inputs["input_ids"].shape[1]
        if tokens > length:
            longer.append(tokens)
        else:
            found.append(inputs)
    if not found:
        raise ConfigError(
            f"{', '.join(sources)}: each row has more than {length} tokens, the shortest "
            f"{min(longer, default=0)}, with those of its images. Raise length, or give smaller "
            "images or shorter texts"
        )
    names = ", ".join(map(title, sources))
    notes = [f"{len(found):,} of {len(rows):,} rows of {names}"]
    if longer:
        notes.append(f"{len(longer)} longer than {length} tokens left out")
    return RowSamples(found, f"{', '.join(notes)}, seed {seed}")
