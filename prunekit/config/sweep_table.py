"""``[sweep]``: runs over all combinations of values of keys of ``[prune]``, seeds and samples."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from prunekit.config.prune_table import Prune
from prunekit.config.structured_table import StructuredPrune
from prunekit.config.tables import NAME_BYTES, Section
from prunekit.config.toml_source import quoted
from prunekit.errors import ConfigError

AXIS_KEYS = frozenset({"sparsity", "parameters"})
"""Keys whose values are the x axis of every figure."""


CALIBRATION_KEYS = ("seed", "samples")
"""Keys of ``[calibration]`` that a sweep may vary too."""
SEEDS = ("seed", "random_seed")
"""Settings of methods that draw numbers: a swept seed sets them too."""
MOST_RUNS = 1000
"""Runs of one sweep; each is planned before the first begins."""


class Sweep(Section):
    """Runs to compare: all combinations of values for keys of [prune].

    Each key of [prune] here has a list of values. An entry of ``method`` may be a table of its name
    and of other keys of [prune]. The keys ``seed`` and ``samples`` are those of [calibration]; runs
    that differ in their seed alone are shown as mean and deviation.
    """

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra={"additionalProperties": {"type": "array", "minItems": 1}},
    )

    tokens: int = Field(default=64, ge=0)
    """New tokens that each model generates for each of a few prompts, to measure speed and text
    quality; 0: none."""
    keep: bool = True
    """Keep the weights of each model. false: delete them after measuring; reports are kept."""


def variants(swept: Mapping[str, object]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the keys of ``[prune]`` of each run.

    The last key of the table changes fastest.

    Args:
        swept: The table ``[sweep]`` as read from TOML.

    Raises:
        ConfigError: A value is not a list, or two runs are equal; one line per error.
    """
    swept_keys = {key: value for key, value in swept.items() if key not in Sweep.model_fields}
    lists = {key: value for key, value in swept_keys.items() if isinstance(value, list) and value}
    mistakes = [
        f"{key}: {quoted(value)} is not a list of values."
        for key, value in swept_keys.items()
        if key not in lists
    ]
    if not lists and not mistakes:
        mistakes.append('sweep: names no key of [prune], such as method = ["obs", "random"].')
    if (count := math.prod(map(len, lists.values()))) > MOST_RUNS:
        mistakes.append(f"these lists make {count:,} runs; a sweep has at most {MOST_RUNS:,}.")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    seen: set[str] = set()
    for values in itertools.product(*lists.values()):
        name = "-".join(map(_name_part, lists, values))
        if name.strip(".") == "" or len(name.encode()) > NAME_BYTES:
            raise ConfigError(
                f"{quoted(name)} would be the folder of a run; it is named by its values, and a "
                f"name has 1 to {NAME_BYTES} bytes and more than dots."
            )
        if name in seen:
            raise ConfigError(f"{name} is listed twice.")
        seen.add(name)
        keys: dict[str, Any] = {}
        for key, value in zip(lists, values, strict=True):
            keys |= _prune_keys(key, value)
        yield name, keys


def split_keys(keys: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys of a run that belong to ``[prune]`` and to ``[calibration]``."""
    text = {key: value for key, value in keys.items() if key in CALIBRATION_KEYS}
    return {key: value for key, value in keys.items() if key not in text}, text


def seed_setting(method: object, classes: Mapping[str, type[BaseModel]]) -> str | None:
    """Return the setting that seeds a method's random numbers, or None.

    Args:
        method: Name of the method.
        classes: The methods by name.
    """
    kind = classes.get(str(method))
    return next((key for key in SEEDS if kind and key in kind.model_fields), None)


def series_label(prune: Mapping[str, Any], keys: Mapping[str, Any]) -> str:
    """Return the legend entry of a run's line in a figure.

    Args:
        prune: Its ``[prune]``, with all defaults.
        keys: Keys of it that the sweep sets.
    """
    parts = [str(prune["method"])]
    for key, value in keys.items():
        if key == "pattern":
            parts.append(" and ".join(value) if isinstance(value, list) else str(value))
        elif key not in {"method", "seed", *AXIS_KEYS}:
            parts.append(f"{key} {value}")
    return ", ".join(parts)


def removed_fraction(prune: Prune | StructuredPrune) -> float:
    """Return the fraction of weights, units or parameters to remove."""
    if prune.sparsity is not None:
        return prune.sparsity
    assert isinstance(prune, StructuredPrune)
    assert prune.parameters is not None
    return 1 - prune.parameters


def _prune_keys(key: str, value: object) -> dict[str, Any]:
    if key == "method" and isinstance(value, dict):
        return {("method" if name == "name" else name): part for name, part in value.items()}
    return {key: value}


def _name_part(key: str, value: object) -> str:
    """Return a value as part of a run's name.

    Numbers of samples are named by their key.
    """
    return f"{key}{value}" if key in CALIBRATION_KEYS else _folder_word(value)


def _folder_word(value: object) -> str:
    """Return a value as a part of a folder name."""
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair if part != "name"]
    text = "+".join(map(_folder_word, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+]+", "_", text)
