"""TODO-DOC prunekit/config/load.py (out of prunekit/config.py)."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import (
    BaseModel,
    ValidationError,
)
from pydantic_core import ErrorDetails

from prunekit.allocations import allocations
from prunekit.config.messages import explain
from prunekit.config.prune_table import Prune
from prunekit.config.run_config import Config, StructuredConfig, SweepConfig
from prunekit.config.structured_table import Shrink, Train, names_units
from prunekit.config.sweep_table import Sweep, variants
from prunekit.config.tables import Calibration, Evaluate, Model, Output, Section
from prunekit.config.toml_source import Key, TomlSource
from prunekit.errors import ConfigError
from prunekit.methods import methods
from prunekit.structured.rankers import rankers


def load_config(
    path: str | Path, overrides: Iterable[str] = ()
) -> "Config | StructuredConfig | SweepConfig":
    """Read a config file.

    Args:
        path: A TOML file. Paths in it are relative to its folder.
        overrides: ``KEY=VALUE`` each, as after ``--set``; they win over the file.

    Raises:
        ConfigError: One line for each mistake, with the line of the file or the override.
    """
    written = TomlSource.read(Path(path))
    config, mistakes = None, []
    for assignment in overrides:
        try:
            written.override(assignment)
        except ConfigError as error:
            mistakes.append(str(error))
    folder = Path(path).parent
    try:
        config = (_sweep if "sweep" in written.values else _single)(written, folder)
    except ConfigError as error:
        mistakes.append(str(error))
    if config is None or mistakes:
        raise ConfigError("\n".join(mistakes))
    return config


def _single(written: TomlSource, folder: Path) -> "Config | StructuredConfig":
    """Return what is written as one run; raise all mistakes at once."""
    kind = StructuredConfig if names_units(written.values.get("prune")) else Config
    try:
        config = kind.model_validate(written.values, strict=True, context={"folder": folder})
    except ValidationError as error:
        raise ConfigError("\n".join(_mistakes(error, written, kind))) from None
    config._text = written.text
    return config


def _sweep(written: TomlSource, folder: Path) -> "SweepConfig":
    """Return what is written as the runs that [sweep] makes of it; raise all mistakes at once."""
    values = dict(written.values)
    table = values.pop("sweep")
    written.values = values
    mistakes, runs, sweep = [], {}, Sweep()
    if "evaluate" not in values:
        mistakes.append(written.locate(("sweep",), "needs [evaluate], whose text it compares by."))
    try:
        sweep = Sweep.model_validate(table, strict=True)
    except ValidationError as error:
        mistakes += [
            written.locate(("sweep", *_key(details["loc"])), explain(details, "sweep", {}))
            for details in error.errors()
        ]
    try:
        made = dict(variants(table if isinstance(table, dict) else {}))
    except ConfigError as error:
        made = {}
        mistakes.append(written.locate(("sweep",), str(error)))
    for name, keys in made.items():
        try:
            runs[name] = _single(written.with_values("prune", keys, "sweep"), folder)
        except ConfigError as error:
            mistakes += str(error).splitlines()
    if mistakes:
        raise ConfigError("\n".join(dict.fromkeys(mistakes)))
    return SweepConfig(sweep, runs, {name: made[name] for name in runs}, written.text)


SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "calibration": Calibration,
    "prune": Prune,
    "evaluate": Evaluate,
    "output": Output,
}


def _mistakes(
    error: ValidationError, written: TomlSource, kind: type[Config] | type[StructuredConfig]
) -> list[str]:
    found = [(_key(details["loc"]), details) for details in error.errors()]
    found.sort(key=lambda mistake: written.order(mistake[0]))
    return [written.locate(key, _sentence(key, details, kind)) for key, details in found]


def _key(loc: tuple[int | str, ...]) -> Key:
    """Return the key as it is written: without list indices and the names of chosen classes."""
    key = [part for part in loc if isinstance(part, str)]
    if key[:2] == ["prune", "allocation"]:
        del key[2:3]
    if key[:2] == ["prune", "method"] and len(key) > 2:
        del key[1:3]
    return tuple(key)


def _sentence(key: Key, error: ErrorDetails, kind: type[Config] | type[StructuredConfig]) -> str:
    owners = [name for name, choice in _choices(kind).items() if key[-1] in choice.model_fields]
    if owners and error["type"] == "extra_forbidden" and error["loc"][:2] == ("prune", "method"):
        return f"a setting of {', '.join(owners)}, not of {error['loc'][2]}."
    return explain(error, key[-1], _allowed(error["loc"], kind))


def _choices(kind: type[Config] | type[StructuredConfig]) -> Mapping[str, type[BaseModel]]:
    return methods() if kind is Config else rankers()


def _allowed(
    loc: tuple[int | str, ...], kind: type[Config] | type[StructuredConfig]
) -> dict[str, str]:
    """Return the keys of the table in which ``loc`` is, with what each means."""
    sections = SECTIONS if kind is Config else {**SECTIONS, "prune": Shrink, "train": Train}
    match loc:
        case ("prune", "method", str(name), *_):
            kinds = [sections["prune"], _choices(kind)[name]]
        case ("prune", "allocation", str(name), *_):
            kinds = [allocations()[name]]
        case (str(section), _, *_):
            kinds = [sections[section]]
        case _:
            kinds = [kind]
    fields = [field for kind in kinds for field in kind.model_fields.items()]
    return {name: field.description or "" for name, field in fields}
