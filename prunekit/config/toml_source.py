"""A TOML text with ``--set`` overrides and the line of every key."""

import copy
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from prunekit.errors import ConfigError

Key = tuple[str, ...]


class TomlSource:
    """Parsed config file with overrides, which knows the place of each key.

    Attributes:
        text: Content of the file.
        values: Parsed values, after overrides.
    """

    def __init__(self, file: str, text: str) -> None:
        self.text = text
        try:
            self.values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(_syntax_error(file, str(error))) from None
        except (RecursionError, ValueError) as error:
            # Too deeply nested brackets, or an integer of thousands of digits.
            raise ConfigError(f"{file}: cannot be read: {error}.") from None
        self._file = file
        # Place of each key: its line, or its override. Of a table that occurs several times, as
        # [a] and in [a.b], the first line counts.
        self._places: dict[Key, int | str] = dict(reversed([*_key_lines(text)]))

    @classmethod
    def read(cls, path: Path) -> "TomlSource":
        """Read and parse a file.

        Raises:
            ConfigError: The file does not exist, cannot be read, or is not TOML.
        """
        try:
            return cls(str(path), path.read_text("utf-8-sig"))
        except FileNotFoundError:
            hint = f"To create one with every key explained: prunekit init {path}"
            raise ConfigError(f"{path}: no such file. {hint}") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: is not text in UTF-8.") from None

    def override(self, assignment: str) -> None:
        """Apply an override ``KEY=VALUE``.

        The key is dotted; the value is TOML, or an unquoted string.

        Raises:
            ConfigError: The override is malformed, or a part of the key is not a table.
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
        section[key[-1]] = _parse_value(value)
        inside = {known for known in self._places if known[: len(key)] == key}
        self._places = {k: place for k, place in self._places.items() if k not in inside}
        self._places[key] = assignment

    def with_values(self, table: str, values: Mapping[str, object], source: str) -> "TomlSource":
        """Return a copy with other values in one table.

        Args:
            table: Name of the table to change.
            values: New values, by key of the table.
            source: Name of the table that contains these keys in the file; errors in the new
                values point there.
        """
        other = copy.copy(self)
        own = self.values.get(table)
        other.values = {**self.values, table: {**(own if isinstance(own, dict) else {}), **values}}
        places = {(table, key): self._find_place((source, key)) for key in values}
        other._places = self._places | places
        return other

    def sort_key(self, key: Key) -> tuple[bool, int]:
        """Return a sort key: keys in order of lines, then overridden keys."""
        place = self._find_place(key)
        return isinstance(place, str), place if isinstance(place, int) else 0

    def locate(self, key: Key, message: str) -> str:
        """Prefix a message with the place of a key or its table."""
        place, name = self._find_place(key), ".".join(key)
        if isinstance(place, int):
            return f"{self._file}{f':{place}' if place else ''}: {name}: {message}"
        if place.partition("=")[0].strip() == name:
            return f"--set {place}: {message}"
        return f"--set {place}: {name}: {message}"

    def _find_place(self, key: Key) -> int | str:
        """Return the line or override of a key or its parent."""
        while key and key not in self._places:
            key = key[:-1]
        return self._places.get(key, 0)


def quoted(value: object) -> str:
    """Return a value in TOML notation, truncated to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _key_lines(text: str) -> Iterator[tuple[Key, int]]:
    """Yield each key with its first line.

    A statement is the smallest number of lines that parses as TOML, so quotes and brackets may span
    lines.
    """
    table: Key = ()
    statement, start = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        try:
            keys = [*_nested_keys(tomllib.loads(statement))]
        except tomllib.TOMLDecodeError:
            continue
        if statement.lstrip().startswith("["):
            table = max(keys, key=len)
            yield from ((table[:depth], start) for depth in range(1, len(table) + 1))
        else:
            yield from ((table + key, start) for key in keys)
        statement, start = "", number + 1


def _nested_keys(values: object) -> Iterator[Key]:
    """Yield the keys of nested tables, outer keys first."""
    if isinstance(values, list):
        for value in values:
            yield from _nested_keys(value)
    elif isinstance(values, dict):
        for key, value in values.items():
            yield (key,)
            yield from ((key, *inner) for inner in _nested_keys(value))


def _syntax_error(file: str, error: str) -> str:
    found = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", error, re.DOTALL)
    if not found:
        return f"{file}: {error}."
    message, line, column = found.groups()
    return f"{file}:{line}: {message} (column {column})."


def _parse_value(text: str) -> object:
    try:
        values = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return values["value"] if len(values) == 1 else text
