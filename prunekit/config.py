"""What the user wrote: typed, frozen, and every mistake said at once with its line."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import (
    BaseModel,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import NullableSchema, WithDefaultSchema

from prunekit.allocations import allocations
from prunekit.errors import ConfigError
from prunekit.formats import formats
from prunekit.kinds import KINDS
from prunekit.methods import methods
from prunekit.mistakes import explain
from prunekit.rankers import rankers
from prunekit.sections import Calibration, Evaluate, Model, Output, Prune, Section
from prunekit.shrink_section import Shrink, Train, names_units
from prunekit.sweep_section import Sweep, variants
from prunekit.written import Key, Written

P = TypeVar("P", Prune, Shrink)


def load_config(
    path: str | Path, overrides: Iterable[str] = ()
) -> "Config | ShrinkConfig | SweepConfig":
    """Read a config file.

    Args:
        path: A TOML file. Paths in it are relative to its folder.
        overrides: ``KEY=VALUE`` each, as after ``--set``; they win over the file.

    Raises:
        ConfigError: One line for each mistake, with the line of the file or the override.
    """
    written = Written.read(Path(path))
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


def _single(written: Written, folder: Path) -> "Config | ShrinkConfig":
    """Return what is written as one run; raise all mistakes at once."""
    kind = ShrinkConfig if names_units(written.values.get("prune")) else Config
    try:
        config = kind.model_validate(written.values, strict=True, context={"folder": folder})
    except ValidationError as error:
        raise ConfigError("\n".join(_mistakes(error, written, kind))) from None
    config._text = written.text
    return config


def _sweep(written: Written, folder: Path) -> "SweepConfig":
    """Return what is written as the runs that [sweep] makes of it; raise all mistakes at once."""
    values = dict(written.values)
    table = values.pop("sweep")
    written.values = values
    mistakes, runs, sweep = [], {}, Sweep()
    if "evaluate" not in values:
        mistakes.append(written.point(("sweep",), "needs [evaluate], whose text it compares by."))
    try:
        sweep = Sweep.model_validate(table, strict=True)
    except ValidationError as error:
        mistakes += [
            written.point(("sweep", *_key(details["loc"])), explain(details, "sweep", {}))
            for details in error.errors()
        ]
    try:
        made = dict(variants(table if isinstance(table, dict) else {}))
    except ConfigError as error:
        made = {}
        mistakes.append(written.point(("sweep",), str(error)))
    for name, keys in made.items():
        try:
            runs[name] = _single(written.varied("prune", keys, "sweep"), folder)
        except ConfigError as error:
            mistakes += str(error).splitlines()
    if mistakes:
        raise ConfigError("\n".join(dict.fromkeys(mistakes)))
    return SweepConfig(sweep, runs, {name: made[name] for name in runs}, written.text)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a config, from which editors complete and explain keys."""
    made, units = (
        kind.model_json_schema(schema_generator=_TomlSchema) for kind in (Config, ShrinkConfig)
    )
    for table in made["$defs"]["Prune"]["oneOf"]:
        table["properties"]["pattern"]["not"] = {"enum": [*KINDS]}
    made["$defs"] = units["$defs"] | made["$defs"]
    prune = made["properties"]["prune"]
    made["properties"]["prune"] = {
        "description": prune.pop("description"),
        "oneOf": [prune, {"$ref": "#/$defs/Shrink"}],
    }
    made["properties"]["train"] = units["properties"]["train"]
    made["properties"]["sweep"] = Sweep.model_json_schema(schema_generator=_TomlSchema)
    return made


class Settings(Section, Generic[P]):
    """What every run has; ``P`` says what it does to the model."""

    model: Model
    """The model to prune."""
    calibration: Calibration | None = None
    """The text from which statistics are gathered."""
    prune: P
    """What is pruned and how."""
    evaluate: Evaluate | None = None
    """The text on which perplexity is measured, before and after."""
    output: Output
    """The pruned checkpoint."""

    _text: str = PrivateAttr("")

    @property
    def text(self) -> str:
        """The file as it was read, comments included."""
        return self._text

    def dump(self) -> dict[str, Any]:
        """Return the config as nested tables, defaults filled in; validates to an equal config."""
        return self.model_dump(mode="json", exclude_none=True)

    @model_validator(mode="before")
    @classmethod
    def _demand_text(cls, values: object) -> object:
        """Where statistics are needed but no [calibration] is written, let its keys be missed."""
        if not isinstance(values, dict) or "calibration" in values:
            return values
        prune = values.get("prune")
        needs_text = _rank_from_text if names_units(prune) else _prune_from_text
        needed = "train" in values or needs_text(prune)
        return {**values, "calibration": {}} if needed else values

    @field_validator("output")
    @classmethod
    def _spares_the_model(cls, output: Output, info: ValidationInfo) -> Output:
        model = info.data.get("model")
        if model and Path(model.path).is_relative_to(output.path):
            raise ValueError(f"the folder {output.path} holds the model itself; name another.")
        return output


class Config(Settings[Prune]):
    """A run that sets weights to zero, as the user wrote it and with every default filled in."""

    @field_validator("output")
    @classmethod
    def _can_be_stored(cls, output: Output, info: ValidationInfo) -> Output:
        prune, kind = info.data.get("prune"), formats()[output.format]
        if prune and kind.patterns and prune.pattern.name not in kind.patterns:
            fitting = " and ".join(kind.patterns)
            raise ValueError(
                f'format "{kind.name}" stores patterns {fitting}, not "{prune.pattern.name}". '
                "Choose bitmask, which stores any, or dense."
            )
        if prune and kind.patterns and prune.allocation.mixes:
            raise ValueError(
                f'format "{kind.name}" stores one pattern, allocation "{prune.allocation.name}" '
                "mixes several. Choose bitmask, which stores any, or dense."
            )
        if prune and prune.recover == "lowrank" and kind.name != "dense":
            raise ValueError(
                f'recover = "lowrank" writes an adapter for dense linears, not for "{kind.name}".'
            )
        return output


class ShrinkConfig(Settings[Shrink]):
    """A run that takes units out, as the user wrote it and with every default filled in."""

    train: Train | None = None
    """Training of what is left; none without this table."""

    @field_validator("train")
    @classmethod
    def _has_text_left(cls, train: Train | None, info: ValidationInfo) -> Train | None:
        calibration = info.data.get("calibration")
        if train and calibration and train.held_out >= calibration.samples:
            raise ValueError(
                f"held_out = {train.held_out} of {calibration.samples} calibration samples leave "
                "none to train on."
            )
        return train

    @field_validator("calibration")
    @classmethod
    def _is_whole(cls, calibration: Calibration | None) -> Calibration | None:
        if calibration and calibration.hidden != "auto":
            raise ValueError(
                "hidden has no meaning where units are taken out, with the whole model in memory."
            )
        return calibration

    @field_validator("output")
    @classmethod
    def _is_dense(cls, output: Output) -> Output:
        if output.format != "dense":
            raise ValueError(
                f'format "{output.format}" stores zeros, of which units that are gone leave none. '
                'Choose "dense"; afterwards the smaller model can be pruned as any other.'
            )
        return output


@dataclass(frozen=True)
class SweepConfig:
    """Runs that are compared with each other.

    Attributes:
        sweep: What the user wrote of the comparison itself.
        runs: The runs by name; all have the output of the whole, in which each gets a folder.
        keys: The keys of [prune] in which they differ.
        text: The file as it was read, comments included.
    """

    sweep: Sweep
    runs: Mapping[str, Config | ShrinkConfig]
    keys: Mapping[str, Mapping[str, Any]]
    text: str

    @property
    def first(self) -> Config | ShrinkConfig:
        """A run, of which everything but [prune] is that of all."""
        return next(iter(self.runs.values()))

    @property
    def model(self) -> Model:
        """The model of all."""
        return self.first.model

    @property
    def output(self) -> Output:
        """The folder of the whole."""
        return self.first.output

    def apart(self, name: str) -> Config | ShrinkConfig:
        """Return a run by itself, in its own folder."""
        config = self.runs[name]
        path = str(Path(config.output.path, "runs", name))
        return config.model_copy(update={"output": config.output.model_copy(update={"path": path})})


SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "calibration": Calibration,
    "prune": Prune,
    "evaluate": Evaluate,
    "output": Output,
}


def _prune_from_text(prune: object) -> bool:
    if not isinstance(prune, dict):
        return False
    asked = (prune.get(key) for key in ("refine", "recover", "permute"))
    if any(asked) or prune.get("target") == "dense":
        return True
    allocation = prune.get("allocation")
    if isinstance(allocation, dict):
        allocation = allocation.get("name")
    chosen = methods().get(str(prune.get("method"))), allocations().get(str(allocation))
    return any(kind is not None and kind.needs for kind in chosen)


def _rank_from_text(prune: object) -> bool:
    assert isinstance(prune, dict)
    ranker = rankers().get(str(prune.get("method")))
    compensate = prune.get("compensate", ranker and ranker.compensate)
    if prune.get("truth") is True:
        return True
    return bool(ranker and ranker.needs_data) or compensate in {"refit", "bias"}


class _TomlSchema(GenerateJsonSchema):
    """JSON schema without null, which TOML does not have."""

    def nullable_schema(self, schema: NullableSchema) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: WithDefaultSchema) -> dict[str, Any]:
        if schema.get("default") is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


def _mistakes(
    error: ValidationError, written: Written, kind: type[Config] | type[ShrinkConfig]
) -> list[str]:
    found = [(_key(details["loc"]), details) for details in error.errors()]
    found.sort(key=lambda mistake: written.order(mistake[0]))
    return [written.point(key, _sentence(key, details, kind)) for key, details in found]


def _key(loc: tuple[int | str, ...]) -> Key:
    """Return the key as it is written: without list indices and the names of chosen classes."""
    key = [part for part in loc if isinstance(part, str)]
    if key[:2] == ["prune", "allocation"]:
        del key[2:3]
    if key[:2] == ["prune", "method"] and len(key) > 2:
        del key[1:3]
    return tuple(key)


def _sentence(key: Key, error: ErrorDetails, kind: type[Config] | type[ShrinkConfig]) -> str:
    owners = [name for name, choice in _choices(kind).items() if key[-1] in choice.model_fields]
    if owners and error["type"] == "extra_forbidden" and error["loc"][:2] == ("prune", "method"):
        return f"a setting of {', '.join(owners)}, not of {error['loc'][2]}."
    return explain(error, key[-1], _allowed(error["loc"], kind))


def _choices(kind: type[Config] | type[ShrinkConfig]) -> Mapping[str, type[BaseModel]]:
    return methods() if kind is Config else rankers()


def _allowed(loc: tuple[int | str, ...], kind: type[Config] | type[ShrinkConfig]) -> dict[str, str]:
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
