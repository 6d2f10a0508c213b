"""Change keys in the text of a config, leaving its comments."""

import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from prunekit.config.toml_statements import statements
from prunekit.errors import ConfigError


def with_changes(text: str, changes: Mapping[str, object]) -> str:
    """Return the text of a config with other values.

    Args:
        text: A TOML text.
        changes: New values by key, as ``prune.sparsity``; None removes the key.

    Raises:
        ConfigError: The text is so written that a key cannot be changed in it.
    """
    expected = tomllib.loads(text)
    for dotted, value in changes.items():
        table, _, key = dotted.partition(".")
        text = _with_change(text, table, key, value)
        if value is None:
            expected.get(table, {}).pop(key, None)
        else:
            expected.setdefault(table, {})[key] = value
    if _values(text) != expected:
        lines = "\n".join(
            f"  {key} = {_toml(value)}" if value is not None else f"  remove {key}"
            for key, value in changes.items()
        )
        raise ConfigError(f"The config is written in a way that is not changed here. Set:\n{lines}")
    return text


def _values(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # a table that was written as prune = {…}
        return None


def _with_change(text: str, table: str, key: str, value: object) -> str:
    lines, current, header = text.split("\n"), "", None
    line = None if value is None else f"{key} = {_toml(value)}"
    for first, statement in statements(text):
        extent = slice(first - 1, first + statement.count("\n"))
        if statement.startswith("["):
            current = statement.partition("#")[0].strip(" []")
            header = first if current == table else header
        elif current == table and re.match(rf"{re.escape(key)}\s*=", statement):
            lines[extent] = [] if line is None else [line]
            return "\n".join(lines)
    if line is None:
        return text
    if header is None:
        return f"{text.rstrip()}\n\n[{table}]\n{line}\n"
    return "\n".join([*lines[:header], line, *lines[header:]])


def _toml(value: Any) -> str:  # noqa: ANN401
    return json.dumps(value, ensure_ascii=False)
