"""A TOML text with ``--set`` overrides and the line of every key."""

import copy
import json
import os
import re
import stat
import tomllib
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from prunekit.config.toml_statements import NESTING_LIMIT, NestingError, statements
from prunekit.errors import ConfigError

Key = tuple[str, ...]
SIZE_LIMIT = 1 << 20
"""Bytes of a config file; real ones have some kilobytes."""
INTEGER_RANGE = "an integer is outside the range of TOML, 64 bits with sign"


class TomlSource:
    """Parsed config file with overrides, which knows the place of each key.

    Attributes:
        text: Content of the file.
        values: Parsed values, after overrides.
    """

    def __init__(self, file: str, text: str) -> None:
        self.text = text
        self.values = _parse(file, text)
        self._file = file
        # Place of each key: its line, or its override. Of a table that occurs several times, as
        # [a] and in [a.b], the first line counts.
        self._places: MutableMapping[Key, int | str] = dict(reversed([*_key_lines(file, text)]))

    @classmethod
    def read(cls, path: Path) -> "TomlSource":
        """Read and parse a file.

        Raises:
            ConfigError: The file does not exist, cannot be read, is too large, or is not TOML.
        """
        try:
            text = _read_file(path).decode("utf-8-sig")
        except FileNotFoundError:
            hint = f"To create one with every key explained: prunekit init {path}"
            raise ConfigError(f"{path}: no such file. {hint}") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: is not text in UTF-8.") from None
        except ValueError:  # a null character
            raise ConfigError(f"{path}: is no name of a file.") from None
        return cls(str(path), text.replace("\r\n", "\n").replace("\r", "\n"))

    def override(self, assignment: str) -> None:
        """Apply an override ``KEY=VALUE``.

        The key is dotted; the value is TOML, or an unquoted string.

        Raises:
            ConfigError: The override is malformed, or a part of the key is not a table.
        """
        name, equals, text = assignment.partition("=")
        key = tuple(part.strip() for part in name.split("."))
        shown = shortened(assignment)
        if not equals or not all(key):
            raise ConfigError(f"--set {shown}: write KEY=VALUE, e.g. prune.sparsity=0.6.")
        if len(key) > NESTING_LIMIT:
            raise ConfigError(f"--set {shown}: a key has at most {NESTING_LIMIT} parts.")
        try:
            value = _parse_value(text)
        except ValueError as error:
            raise ConfigError(f"--set {shown}: {error}.") from None
        section = self.values
        for depth, part in enumerate(key[:-1], 1):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"--set {shown}: {_dotted(key[:depth])} is not a table.")
            self._places.setdefault(key[:depth], assignment)
        section[key[-1]] = value
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
        places: dict[Key, int | str] = {
            (table, key): self._find_place((source, key)) for key in values
        }
        other._places = ChainMap(places, self._places)
        return other

    def sort_key(self, key: Key) -> tuple[bool, int]:
        """Return a sort key: keys in order of lines, then overridden keys."""
        place = self._find_place(key)
        return isinstance(place, str), place if isinstance(place, int) else 0

    def locate(self, key: Key, message: str) -> str:
        """Prefix a message with the place of a key or its table."""
        place, name = self._find_place(key), _dotted(key)
        if isinstance(place, int):
            return f"{self._file}{f':{place}' if place else ''}: {name}: {message}"
        shown = shortened(place)
        if place.partition("=")[0].strip() == name:
            return f"--set {shown}: {message}"
        return f"--set {shown}: {name}: {message}"

    def _find_place(self, key: Key) -> int | str:
        """Return the line or override of a key or its parent."""
        while key and key not in self._places:
            key = key[:-1]
        return self._places.get(key, 0)


def quoted(value: object) -> str:
    """Return a value in TOML notation, truncated to 60 characters."""
    return shortened(json.dumps(value, ensure_ascii=False, default=str), 60)


def shortened(text: str, most: int = 120) -> str:
    """Return a text on one line, truncated to a number of characters."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= most else f"{line[: most - 3]}…"


def _key_lines(file: str, text: str) -> Iterator[tuple[Key, int]]:
    """Yield each key with its first line; refuse integers outside TOML's range."""
    table: Key = ()
    for line, statement in statements(text):
        try:
            keys = [*_nested_keys(_load(statement))]
        except ValueError as error:
            raise ConfigError(f"{file}:{line}: {error}.") from None
        if statement.startswith("["):
            table = max(keys, key=len)
            yield from ((table[:depth], line) for depth in range(1, len(table) + 1))
        else:
            yield from ((table + key, line) for key in keys)


def _nested_keys(values: object) -> Iterator[Key]:
    """Yield the keys of nested tables, outer keys first."""
    if isinstance(values, list):
        for value in values:
            yield from _nested_keys(value)
    elif isinstance(values, dict):
        for key, value in values.items():
            yield (key,)
            yield from ((key, *inner) for inner in _nested_keys(value))


def _read_file(path: Path) -> bytes:
    """Return the content of a regular file.

    A pipe is refused, as it might never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123  a descriptor is no path
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(f"{path}: is not a file but a folder, pipe or device.")
        content = file.read(SIZE_LIMIT + 1)
    if len(content) > SIZE_LIMIT:
        raise ConfigError(f"{path}: is larger than a config may be, {SIZE_LIMIT >> 20} MiB.")
    return content


def _parse(file: str, text: str) -> dict[str, Any]:
    try:
        for _ in statements(text):
            pass  # the limit of nesting holds before tomllib reads the text
        return tomllib.loads(text)
    except NestingError as error:
        raise ConfigError(f"{file}:{error.line}: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_error(file, str(error))) from None
    except ValueError:
        return {}  # an integer of thousands of digits, whose line _key_lines names


def _load(text: str) -> dict[str, Any]:
    """Return the values of a TOML text.

    Raises:
        ValueError: The text is not TOML, or an integer is outside TOML's range.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:
        raise ValueError(INTEGER_RANGE) from None
    if not _integers_fit(values):
        raise ValueError(INTEGER_RANGE)
    return values


def _integers_fit(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_integers_fit, value.values()))
    if isinstance(value, list):
        return all(map(_integers_fit, value))
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def _syntax_error(file: str, error: str) -> str:
    found = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", error, re.DOTALL)
    if not found:
        return f"{file}: {error}."
    message, line, column = found.groups()
    return f"{file}:{line}: {message} (column {column})."


def _parse_value(text: str) -> object:
    """Return the value of an override: TOML, or else the text itself.

    Raises:
        ValueError: It nests too deeply, or has an integer outside TOML's range.
    """
    statement = f"value = {text}"
    for _ in statements(statement):
        pass
    try:
        values = _load(statement)
    except tomllib.TOMLDecodeError:
        return text
    return values["value"] if len(values) == 1 else text


def _dotted(key: Key) -> str:
    return shortened(".".join(key))
