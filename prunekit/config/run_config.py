"""Typed, frozen configs of runs, and the checks across their tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import (
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError
from typing_extensions import override

from prunekit.allocations import allocations
from prunekit.checkpoint.formats import formats
from prunekit.config.apt_table import Apt
from prunekit.config.distill_table import Distill
from prunekit.config.evaluate_table import Evaluate
from prunekit.config.gates_table import Gates
from prunekit.config.messages import MisplacedError
from prunekit.config.prune_table import DEFAULT_METHOD, Prune, calibration_user
from prunekit.config.quantize_key import AFTERWARDS, quantize_mistake
from prunekit.config.structured_table import StructuredPrune, prunes_units
from prunekit.config.sweep_table import Sweep
from prunekit.config.tables import Calibration, Model, Output, Section
from prunekit.config.toml_source import Key
from prunekit.config.train_table import Train
from prunekit.methods import methods
from prunekit.structured.rankers import rankers

P = TypeVar("P", Prune, StructuredPrune)


class RunConfig(Section, Generic[P]):
    """Tables that every run has; ``P`` is the type of ``[prune]``."""

    model: Model
    """The model to prune."""
    calibration: Calibration | None = None
    """The text from which statistics are gathered."""
    apt: Apt | None = None
    """Training of adapters that prune units and grow, in place of [prune] and [train]."""
    prune: P
    """Weights or units to prune, and the method."""
    train: Train | None = Field(default=None, validate_default=True)
    """Training of the pruned model, or of the model while it is pruned; without this table there is
    none."""
    distill: Distill | None = None
    """Training towards the outputs of the model before pruning, its teacher."""
    evaluate: Evaluate | None = None
    """The text on which perplexity is measured, before and after."""
    gates: Gates | None = None
    """Limits that the pruned model has to keep."""
    output: Output
    """The pruned checkpoint."""

    _text: str = PrivateAttr("")

    @property
    def text(self) -> str:
        """Text of the config file, comments included."""
        return self._text

    ranks_by_block: ClassVar[bool] = False
    """Whether a model that is trained after it was pruned is pruned block by block."""

    @property
    def training(self) -> Train | Apt | None:
        """The training of the run, of either table."""
        return self.apt or self.train

    def dump(self) -> dict[str, Any]:
        """Return the config as nested tables with all defaults.

        Validating them gives an equal config.
        """
        return self.model_dump(mode="json", exclude_none=True)

    @model_validator(mode="before")
    @classmethod
    def _require_calibration(cls, values: object) -> object:
        """Add an empty ``[calibration]`` if needed, so that missing keys are reported."""
        if not isinstance(values, dict) or "calibration" in values:
            return values
        prune = values.get("prune")
        needs_text = _rank_from_text if prunes_units(prune) else _prune_from_text
        needed = "train" in values or "apt" in values or needs_text(prune)
        return {**values, "calibration": {}} if needed else values

    @field_validator("train")
    @classmethod
    def _check_train(cls, train: Train | None, info: ValidationInfo) -> Train | None:
        if mistakes := cls._train_mistakes(train, info.data):
            raise MisplacedError(mistakes)
        return train

    @classmethod
    def _train_mistakes(cls, train: Train | None, data: dict[str, Any]) -> dict[Key, str]:
        """Return contradictions with ``[train]``, or its absence, by key."""
        calibration, prune, mistakes = data.get("calibration"), data.get("prune"), {}
        training, table = train or data.get("apt"), "train" if train else "apt"
        if training and calibration and training.held_out >= calibration.samples:
            mistakes[table, "held_out"] = (
                f"{training.held_out} of {calibration.samples} calibration samples leave none to "
                "train on."
            )
        if training and calibration and calibration.length < 2 and not calibration.task:
            mistakes["calibration", "length"] = (
                f"a sample of 1 token has none to predict; [{table}] needs 2 or more."
            )
        streams = cls.ranks_by_block and prune and prune.end is None and not data.get("apt")
        if training and calibration and calibration.hidden != "auto" and not streams:
            mistakes["calibration", "hidden"] = (
                f"does not apply with [{table}], which holds the whole model in memory."
            )
        if train and data.get("apt"):
            mistakes["train",] = "[apt] trains too. Remove one of both tables."
        end = prune and prune.end
        if end is not None and train is None:
            mistakes["prune", "end"] = "counts the steps of [train], and there is no such table."
        if end is not None and train and end > train.steps:
            mistakes["prune", "end"] = f"{end} is beyond the training: train.steps = {train.steps}."
        return mistakes

    @field_validator("distill")
    @classmethod
    def _check_distill(cls, distill: Distill | None, info: ValidationInfo) -> Distill | None:
        if distill is None or not {"train", "apt"} <= info.data.keys():  # one is reported already
            return distill
        if (training := info.data["train"] or info.data.get("apt")) is None:
            raise ValueError(
                "distills while a model is trained, and there is no table [train] or [apt]."
            )
        if mistakes := distill.mistakes(training.steps):
            raise MisplacedError({("distill", key): mistakes[key] for key in mistakes})
        return distill

    @field_validator("gates")
    @classmethod
    def _check_gates(cls, gates: Gates | None, info: ValidationInfo) -> Gates | None:
        if gates and (mistakes := gates.mistakes(info.data)):
            raise MisplacedError({("gates", key): mistakes[key] for key in mistakes})
        return gates

    @field_validator("output")
    @classmethod
    def _check_output_folder(cls, output: Output, info: ValidationInfo) -> Output:
        model = info.data.get("model")
        if model and Path(model.path).is_relative_to(output.path):
            raise ValueError(f"the folder {output.path} contains the model; name another.")
        return output


class Config(RunConfig[Prune]):
    """Config of a run that sets weights to zero, with all defaults."""

    @override
    @classmethod
    def _train_mistakes(cls, train: Train | None, data: dict[str, Any]) -> dict[Key, str]:
        mistakes = super()._train_mistakes(train, data)
        prune = data.get("prune")
        if train and prune and prune.recover == "lowrank":
            mistakes["prune", "recover"] = (
                '"lowrank" writes an adapter for the weights before [train], not after. Remove it; '
                "to train an adapter, set train.adapter."
            )
        return mistakes

    @field_validator("output")
    @classmethod
    def _check_format(cls, output: Output, info: ValidationInfo) -> Output:
        prune, kind = info.data.get("prune"), formats()[output.format]
        if output.quantize and (mistake := quantize_mistake(kind.name, info.data)):
            raise MisplacedError({("output", "quantize"): mistake})
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


class StructuredConfig(RunConfig[StructuredPrune]):
    """Config of a run that removes whole units, with all defaults."""

    ranks_by_block: ClassVar[bool] = True

    prune: StructuredPrune = Field(default=None, validate_default=True)  # pyright: ignore
    """Units to prune, and the ranker; with [apt] it follows from that table."""

    @field_validator("prune", mode="before")
    @classmethod
    def _prune_of_apt(cls, prune: object, info: ValidationInfo) -> object:
        apt = info.data.get("apt")
        if prune is None and "apt" not in info.data:  # an invalid [apt] is reported already
            raise MisplacedError({})
        if prune is None and apt is None:
            raise PydanticKnownError("missing")
        if prune is not None and apt is not None:
            raise ValueError("[apt] prunes by itself. Remove one of both tables.")
        return apt.as_prune() if apt else prune

    @override
    def dump(self) -> dict[str, Any]:
        values = super().dump()
        if self.apt:
            del values["prune"]
        return values

    @field_validator("output")
    @classmethod
    def _check_format(cls, output: Output) -> Output:
        if output.quantize:
            mistake = f"does not go with the removal of units yet. {AFTERWARDS}"
            raise MisplacedError({("output", "quantize"): mistake})
        if output.format != "dense":
            raise ValueError(
                f'format "{output.format}" stores zeros, but removed units leave none. '
                'Choose "dense"; afterwards the smaller model can be pruned like any other.'
            )
        return output


@dataclass(frozen=True)
class SweepConfig:
    """Config of a sweep: several runs that are compared.

    Attributes:
        sweep: Settings of the comparison itself.
        runs: Configs by name; all have the output folder of the sweep, see :meth:`standalone`.
        keys: Keys of ``[prune]`` in which each run differs, by name.
        text: Text of the config file, comments included.
    """

    sweep: Sweep
    runs: Mapping[str, Config | StructuredConfig]
    keys: Mapping[str, Mapping[str, Any]]
    text: str

    @property
    def first(self) -> Config | StructuredConfig:
        """The first run; all runs share its tables other than ``[prune]``."""
        return next(iter(self.runs.values()))

    @property
    def model(self) -> Model:
        """The model of all runs."""
        return self.first.model

    @property
    def output(self) -> Output:
        """The output folder of the sweep."""
        return self.first.output

    def standalone(self, name: str) -> Config | StructuredConfig:
        """Return the config of one run, with its own subfolder as output."""
        config = self.runs[name]
        path = str(Path(config.output.path, "runs", name))
        return config.model_copy(update={"output": config.output.model_copy(update={"path": path})})


def _prune_from_text(prune: object) -> bool:
    if not isinstance(prune, dict):
        return False
    allocation = prune.get("allocation")
    if isinstance(allocation, dict):
        allocation = allocation.get("name")
    chosen = (
        methods().get(str(prune.get("method", DEFAULT_METHOD))),
        allocations().get(str(allocation)),
    )
    return calibration_user(prune, *chosen) is not None


def _rank_from_text(prune: object) -> bool:
    assert isinstance(prune, dict)
    ranker = rankers().get(str(prune.get("method")))
    compensate = prune.get("compensate", ranker and ranker.compensate)
    if prune.get("truth") is True:
        return True
    return bool(ranker and ranker.needs_data) or compensate in {"refit", "bias"}
