"""What the user wrote: typed, frozen, and every mistake said at once with its line."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import (
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prunekit.allocations import allocations
from prunekit.checkpoint.formats import formats
from prunekit.config.prune_table import Prune
from prunekit.config.structured_table import Shrink, Train, names_units
from prunekit.config.sweep_table import Sweep
from prunekit.config.tables import Calibration, Evaluate, Model, Output, Section
from prunekit.methods import methods
from prunekit.structured.rankers import rankers

P = TypeVar("P", Prune, Shrink)


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


class StructuredConfig(Settings[Shrink]):
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
    runs: Mapping[str, Config | StructuredConfig]
    keys: Mapping[str, Mapping[str, Any]]
    text: str

    @property
    def first(self) -> Config | StructuredConfig:
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

    def apart(self, name: str) -> Config | StructuredConfig:
        """Return a run by itself, in its own folder."""
        config = self.runs[name]
        path = str(Path(config.output.path, "runs", name))
        return config.model_copy(update={"output": config.output.model_copy(update={"path": path})})


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
