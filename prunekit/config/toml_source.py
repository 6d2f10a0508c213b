"""What the user wrote and where: a TOML text, ``--set`` overrides, the place of every key."""

import copy
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from prunekit.errors import ConfigError

Key = tuple[str, ...]


class TomlSource:
    """The values of a config file, overrides applied, and what is needed to point into it.

    Attributes:
        text: The file as it is.
        values: What it says, after the overrides.
    """

    def __init__(self, file: str, text: str) -> None:
        self.text = text
        try:
            self.values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(_syntax(file, str(error))) from None
        except (RecursionError, ValueError) as error:
            # Brackets that nest without end, or a number of thousands of digits.
            raise ConfigError(f"{file}: cannot be read: {error}.") from None
        self._file = file
        # Where a table is named twice, as [a] and in [a.b], its first line counts.
        self._places: dict[Key, int | str] = dict(reversed([*_lines(text)]))

    @classmethod
    def read(cls, path: Path) -> "TomlSource":
        """Read a file.

        Raises:
            ConfigError: There is no such file, or it is not TOML.
        """
        try:
            return cls(str(path), path.read_text("utf-8-sig"))
        except FileNotFoundError:
            hint = f"To write one with every key explained: prunekit init {path}"
            raise ConfigError(f"{path}: no such file. {hint}") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: is not text in UTF-8.") from None

    def override(self, assignment: str) -> None:
        """Apply ``KEY=VALUE``: a dotted key; a TOML value, or a bare word for a string.

        Raises:
            ConfigError: It is not of that form, or a part of the key is not a section.
        """
        name, equals, value = assignment.partition("=")
        key = tuple(part.strip() for part in name.split("."))
        if not equals or not all(key):
            raise ConfigError(f"--set {assignment}: write KEY=VALUE, e.g. prune.sparsity=0.6.")
        section = self.values
        for depth, part in enumerate(key[:-1], 1):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"--set {assignment}: {'.'.join(key[:depth])} is not a table.")
            self._places.setdefault(key[:depth], assignment)
        section[key[-1]] = _value(value)
        inside = {known for known in self._places if known[: len(key)] == key}
        self._places = {k: place for k, place in self._places.items() if k not in inside}
        self._places[key] = assignment

    def with_values(self, table: str, values: Mapping[str, object], source: str) -> "TomlSource":
        """Return a copy in which ``table`` has other values, each in the place of its ``source``.

        The copy's mistakes in these values point to where the table ``source`` says them.
        """
        other = copy.copy(self)
        own = self.values.get(table)
        other.values = {**self.values, table: {**(own if isinstance(own, dict) else {}), **values}}
        places = {(table, key): self._place((source, key)) for key in values}
        other._places = self._places | places
        return other

    def order(self, key: Key) -> tuple[bool, int]:
        """Return what sorts keys as they are written: the file's lines, then the overrides."""
        place = self._place(key)
        return isinstance(place, str), place if isinstance(place, int) else 0

    def locate(self, key: Key, message: str) -> str:
        """Return ``message`` behind the place of ``key``, or of the section that lacks it."""
        place, name = self._place(key), ".".join(key)
        if isinstance(place, int):
            return f"{self._file}{f':{place}' if place else ''}: {name}: {message}"
        if place.partition("=")[0].strip() == name:
            return f"--set {place}: {message}"
        return f"--set {place}: {name}: {message}"

    def _place(self, key: Key) -> int | str:
        """Return the line of the nearest key that is written, 0 if none is, or an override."""
        while key and key not in self._places:
            key = key[:-1]
        return self._places.get(key, 0)


def shown(value: object) -> str:
    """Return a value as TOML would write it, cut where it gets long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _lines(text: str) -> Iterator[tuple[Key, int]]:
    """Yield each key with the line on which it begins.

    A statement is the least number of lines that is TOML by itself, whatever quotes and brackets
    it spans.
    """
    table: Key = ()
    statement, start = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        try:
            keys = [*_keys(tomllib.loads(statement))]
        except tomllib.TOMLDecodeError:
            continue
        if statement.lstrip().startswith("["):
            table = max(keys, key=len)
            yield from ((table[:depth], start) for depth in range(1, len(table) + 1))
        else:
            yield from ((table + key, start) for key in keys)
        statement, start = "", number + 1


def _keys(values: object) -> Iterator[Key]:
    """Yield the keys of nested tables, outer ones first."""
    if isinstance(values, list):
        for value in values:
            yield from _keys(value)
    elif isinstance(values, dict):
        for key, value in values.items():
            yield (key,)
            yield from ((key, *inner) for inner in _keys(value))


def _syntax(file: str, error: str) -> str:
    found = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", error, re.DOTALL)
    if not found:
        return f"{file}: {error}."
    message, line, column = found.groups()
    return f"{file}:{line}: {message} (column {column})."


def _value(text: str) -> object:
    try:
        values = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return values["value"] if len(values) == 1 else text
