"""Load and validate a config file, reporting all errors with their lines."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from prunekit.allocations import allocations
from prunekit.config.apt_table import Apt
from prunekit.config.distill_table import Distill
from prunekit.config.evaluate_table import Evaluate
from prunekit.config.gates_table import Gates
from prunekit.config.messages import MisplacedError, explain
from prunekit.config.prune_table import DEFAULT_METHOD, Prune
from prunekit.config.run_config import Config, StructuredConfig, SweepConfig
from prunekit.config.structured_table import StructuredPrune, prunes_units
from prunekit.config.sweep_table import Sweep, seed_setting, split_keys, variants
from prunekit.config.tables import Calibration, Model, Output, Section
from prunekit.config.toml_source import Key, TomlSource, quoted
from prunekit.config.train_table import Adapter, Train
from prunekit.errors import ConfigError
from prunekit.methods import methods
from prunekit.structured.rankers import rankers

MISTAKES_SHOWN = 100
"""Mistakes in one message; a file that is no config may have thousands."""


def load_config(
    path: str | Path, overrides: Iterable[str] = ()
) -> "Config | StructuredConfig | SweepConfig":
    """Load a config file.

    Args:
        path: A TOML file. Paths in it are relative to its folder.
        overrides: Assignments ``KEY=VALUE``, as after ``--set``; they take precedence over the
            file.

    Raises:
        ConfigError: The config is invalid; one line per error, with its place, up to a hundred.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"config: {quoted(path)} is not a path of a TOML file.")
    return _load(TomlSource.read(Path(path)), Path(path).parent, overrides)


def load_config_text(
    text: str, folder: Path, name: str = "config.toml"
) -> "Config | StructuredConfig | SweepConfig":
    """Load a config from its text.

    Args:
        text: TOML.
        folder: Folder at which relative paths in it start.
        name: Name of the file in messages.

    Raises:
        ConfigError: As of :func:`load_config`.
    """
    return _load(TomlSource(name, text), folder, ())


def _load(
    source: TomlSource, folder: Path, overrides: Iterable[str]
) -> "Config | StructuredConfig | SweepConfig":
    config, errors = None, []
    for assignment in _assignments(overrides):
        try:
            source.override(assignment)
        except ConfigError as error:
            errors.append(str(error))
    try:
        config = (_load_sweep if "sweep" in source.values else _load_run)(source, folder)
    except ConfigError as error:
        errors.append(str(error))
    if config is None or errors:
        raise ConfigError("\n".join(_first(errors)))
    return config


def _assignments(overrides: Iterable[str]) -> list[str]:
    given = [overrides] if isinstance(overrides, str) else overrides
    if not isinstance(given, Iterable) or not all(isinstance(each, str) for each in given):
        raise ConfigError(f"overrides: {quoted(given)} are not texts KEY=VALUE.")
    return [*given]


def _load_run(source: TomlSource, folder: Path) -> "Config | StructuredConfig":
    """Validate the config of a single run; raise all errors at once."""
    units = "apt" in source.values or prunes_units(source.values.get("prune"))
    kind = StructuredConfig if units else Config
    try:
        config = kind.model_validate(source.values, strict=True, context={"folder": folder})
    except ValidationError as error:
        raise ConfigError("\n".join(_first(_error_lines(error, source, kind)))) from None
    config._text = source.text
    return config


def _load_sweep(source: TomlSource, folder: Path) -> "SweepConfig":
    """Validate ``[sweep]`` and each of its runs; raise all errors at once."""
    values = dict(source.values)
    table = values.pop("sweep")
    source.values = values
    errors, runs, sweep = [*_sweep_mistakes(source)], {}, Sweep()
    try:
        sweep = Sweep.model_validate(table, strict=True)
    except ValidationError as error:
        errors += [
            source.locate(
                ("sweep", *_config_key(details["loc"])),
                explain(details, "sweep", Sweep.model_fields),
            )
            for details in error.errors()
        ]
    try:
        prune_keys = dict(variants(table if isinstance(table, dict) else {}))
    except ConfigError as error:
        prune_keys = {}
        errors.append(source.locate(("sweep",), str(error)))
    for name, keys in prune_keys.items():
        if len(errors) > MISTAKES_SHOWN:
            break
        try:
            runs[name] = _load_run(_with_keys(source, keys), folder)
        except ConfigError as error:
            errors += str(error).splitlines()
    if errors:
        raise ConfigError("\n".join(_first(dict.fromkeys(errors))))
    return SweepConfig(sweep, runs, {name: prune_keys[name] for name in runs}, source.text)


def _with_keys(source: TomlSource, keys: Mapping[str, Any]) -> TomlSource:
    """Return the config of one run of a sweep."""
    prune, text = split_keys(keys)
    known = source.values.get("prune")
    whole = {**(known if isinstance(known, dict) else {}), **prune}
    classes = rankers() if prunes_units(whole) else methods()
    method = whole.get("method", DEFAULT_METHOD)
    if "seed" in text and (setting := seed_setting(method, classes)):
        prune[setting] = text["seed"]
    one = source.with_values("prune", prune, "sweep")
    if text and ("calibration" in source.values or text.keys() - {"seed"}):
        one = one.with_values("calibration", text, "sweep")
    return one


def _sweep_mistakes(source: TomlSource) -> Iterator[str]:
    """Yield mistakes in tables that a sweep needs, or does not take."""
    if "evaluate" not in source.values:
        yield source.locate(("sweep",), "needs [evaluate], whose text it compares by.")
    if "gates" in source.values:
        message = "a sweep compares runs, whatever they reach. Remove this table or [sweep]."
        yield source.locate(("gates",), message)


TABLES: dict[str, type[Section]] = {
    "model": Model,
    "calibration": Calibration,
    "apt": Apt,
    "prune": Prune,
    "train": Train,
    "distill": Distill,
    "evaluate": Evaluate,
    "gates": Gates,
    "output": Output,
}


def _error_lines(
    error: ValidationError, source: TomlSource, kind: type[Config] | type[StructuredConfig]
) -> Iterator[str]:
    """Yield one message per error, in the order of the file."""
    errors: list[tuple[Key, str]] = []
    for details in error.errors(include_url=False):
        cause = details.get("ctx", {}).get("error")
        if isinstance(cause, MisplacedError):
            errors += cause.messages.items()
        else:
            key = _config_key(details["loc"])
            errors.append((key, _message(key, details, kind)))
    errors.sort(key=lambda entry: source.sort_key(entry[0]))
    for key, message in errors:
        yield source.locate(key, message)


def _first(lines: Iterable[str]) -> list[str]:
    """Return the first lines, and one that says that there are more."""
    shown = [*itertools.islice(lines, MISTAKES_SHOWN + 1)]
    if len(shown) <= MISTAKES_SHOWN:
        return shown
    return [*shown[:MISTAKES_SHOWN], f"These are the first {MISTAKES_SHOWN} mistakes of more."]


def _config_key(loc: tuple[int | str, ...]) -> Key:
    """Return the config key of an error location of pydantic.

    Drops list indices and the names of plug-in classes, which the config does not contain.
    """
    key = [part for part in loc if isinstance(part, str)]
    if key[:2] == ["prune", "allocation"]:
        del key[2:3]
    if key[:2] == ["prune", "method"] and len(key) > 2:
        del key[1:3]
    return tuple(key)


def _message(key: Key, error: ErrorDetails, kind: type[Config] | type[StructuredConfig]) -> str:
    owners = [
        name for name, choice in _plugin_classes(kind).items() if key[-1] in choice.model_fields
    ]
    if owners and error["type"] == "extra_forbidden" and error["loc"][:2] == ("prune", "method"):
        return f"a setting of {', '.join(owners)}, not of {error['loc'][2]}."
    return explain(error, key[-1], _fields(error["loc"], kind))


def _plugin_classes(kind: type[Config] | type[StructuredConfig]) -> Mapping[str, type[BaseModel]]:
    return methods() if kind is Config else rankers()


def _fields(
    loc: tuple[int | str, ...], kind: type[Config] | type[StructuredConfig]
) -> dict[str, FieldInfo]:
    """Return the fields of the table at an error location, by key."""
    sections = TABLES if kind is Config else {**TABLES, "prune": StructuredPrune}
    match loc:
        case ("prune", "method", str(name), *_):
            kinds = [sections["prune"], _plugin_classes(kind)[name]]
        case ("prune", "allocation", str(name), *_):
            kinds = [allocations()[name]]
        case ("train", "adapter", _, *_):
            kinds = [Adapter]
        case (str(section), _, *_):
            kinds = [sections[section]]
        case _:
            kinds = [kind]
    return {name: field for kind in kinds for name, field in kind.model_fields.items()}
