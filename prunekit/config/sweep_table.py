"""``[sweep]``: the values that keys of ``[prune]`` take in turn, every one with every other."""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, Field

from prunekit.config.prune_table import Prune
from prunekit.config.structured_table import Shrink
from prunekit.config.tables import Section
from prunekit.config.toml_source import shown
from prunekit.errors import ConfigError

LEVELS = frozenset({"sparsity", "parameters"})
"""The keys whose values lie along the axis of every picture."""


class Sweep(Section):
    """Runs that are compared: any key of [prune] as a list, each value with each of the others.

    An entry of ``method`` may be a table of its name and of other keys of [prune].
    """

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra={"additionalProperties": {"type": "array", "minItems": 1}},
    )

    tokens: int = Field(default=64, ge=0)
    """Tokens that each model writes to each of a few prompts, for speed and quality of text; 0:
    none."""
    keep: bool = True
    """False removes the weights of each model once it is measured; its report stays."""


def variants(swept: Mapping[str, object]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and keys of [prune] of each run, the last key of the table changing fastest.

    Args:
        swept: The table as it is written.

    Raises:
        ConfigError: A value is no list, or two runs would be the same; one line each.
    """
    swept_keys = {key: value for key, value in swept.items() if key not in Sweep.model_fields}
    lists = {key: value for key, value in swept_keys.items() if isinstance(value, list) and value}
    mistakes = [
        f"{key}: {shown(value)} is not a list of values to take in turn."
        for key, value in swept_keys.items()
        if key not in lists
    ]
    if not lists and not mistakes:
        mistakes.append('sweep: names no key of [prune], such as method = ["obs", "random"].')
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    seen: set[str] = set()
    for values in itertools.product(*lists.values()):
        name = "-".join(map(_word, values))
        if name in seen:
            raise ConfigError(f"{name} is there twice.")
        seen.add(name)
        keys: dict[str, Any] = {}
        for key, value in zip(lists, values, strict=True):
            keys |= _keys(key, value)
        yield name, keys


def series(prune: Mapping[str, Any], keys: Mapping[str, Any]) -> str:
    """Return what tells a run from those of other lines in a picture.

    Args:
        prune: Its [prune], with every default.
        keys: The keys of it that are swept.
    """
    parts = [str(prune["method"])]
    for key, value in keys.items():
        if key == "pattern":
            parts.append(" and ".join(value) if isinstance(value, list) else str(value))
        elif key not in {"method", *LEVELS}:
            parts.append(f"{key} {value}")
    return ", ".join(parts)


def level(prune: Prune | Shrink) -> float:
    """Return what a run lays along the axis: the part that is to go."""
    if prune.sparsity is not None:
        return prune.sparsity
    assert isinstance(prune, Shrink)
    assert prune.parameters is not None
    return 1 - prune.parameters


def _keys(key: str, value: object) -> dict[str, Any]:
    if key == "method" and isinstance(value, dict):
        return {("method" if name == "name" else name): part for name, part in value.items()}
    return {key: value}


def _word(value: object) -> str:
    """Return a value as a part of a folder's name."""
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair if part != "name"]
    text = "+".join(map(_word, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+]+", "_", text)
