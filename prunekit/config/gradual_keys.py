"""Keys of ``[prune]`` for pruning while a model is trained."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from prunekit.allocations.schedules import PruneSchedule
from prunekit.config.tables import Section

ScheduleName = Literal["one-shot", "linear", "cubic"]

End = Annotated[
    int | None,
    Field(
        ge=0,
        description="Prune while training: the optimizer step of [train] at which the sparsity is "
        "reached; 0 is before the first. Without this key the model is pruned once, then trained.",
    ),
]
Start = Annotated[
    int | None,
    Field(
        ge=0,
        description="Optimizer step at which pruning while training starts; only with end. "
        "Default: 0.",
    ),
]
Every = Annotated[
    int | None,
    Field(
        ge=1,
        description="Optimizer steps from start between two prunings, each of which ranks anew and "
        "reaches the sparsity of the schedule; the last is at end in any case. Only with end. "
        "Default: 1.",
    ),
]
Regrow = Annotated[
    float,
    Field(
        ge=0,
        lt=1,
        description="Fraction of the pruned weights or units that returns at a regrowth: those "
        "with the largest gradients; as many of the lowest scores are pruned. Only with end.",
    ),
]
RegrowEvery = Annotated[
    int | None,
    Field(
        ge=1,
        description="Optimizer steps between two regrowths, which lie between start and end; only "
        "with regrow. Default: every.",
    ),
]

ONLY_BEFORE_TRAINING = {
    "recover": "training recovers",
    "permute": "channels keep their order then",
    "measure_error": "a layer has no single error then",
    "compensate": "training compensates",
    "truth": "units are scored several times then",
}
"""Keys for a model that is pruned once; why they do not apply while it is trained."""


class GradualKeys(Section):
    """Checks of the keys that prune over the steps of training."""

    if TYPE_CHECKING:
        sparsity: Any
        steps: Any
        end: End
        start: Start
        every: Every
        schedule: ScheduleName
        initial_sparsity: float
        regrow: Regrow
        regrow_every: RegrowEvery

    @property
    def gradual(self) -> PruneSchedule | None:
        """The schedule of the sparsity; None if it is pruned once."""
        if self.end is None:
            return None
        name = self.schedule if fixed_sparsity(self.__dict__) is None else "one-shot"
        start, every = self.start or 0, self.every or 1
        return PruneSchedule(name, self.sparsity, self.end, start, every, self.initial_sparsity)

    @property
    def regrowth_interval(self) -> int | None:
        """Optimizer steps between two regrowths; None without any."""
        return (self.regrow_every or self.every or 1) if self.regrow else None

    @field_validator("end", check_fields=False)
    @classmethod
    def _check_end(cls, end: int | None, info: ValidationInfo) -> int | None:
        steps = info.data.get("steps", 1)
        if end is not None and steps != 1:
            raise ValueError(
                f"steps = {steps} reaches the sparsity before training, end while training; remove "
                "one of both."
            )
        return end

    @field_validator("start", "every", "regrow", check_fields=False)
    @classmethod
    def _check_trains(cls, value: float | None, info: ValidationInfo) -> float | None:
        end = info.data.get("end", 0)  # an invalid one is reported already
        if value is not None and end is None:
            raise ValueError("applies only with end, to prune while training.")
        if info.field_name == "start" and value is not None and value > end and "end" in info.data:
            raise ValueError(f"{value} is after end = {end}.")
        if fixed_sparsity(info.data) is not None:
            name = info.data["pattern"].name
            raise ValueError(f'"{name}" fixes the sparsity: it is pruned once, at end.')
        return value

    @field_validator("regrow_every", check_fields=False)
    @classmethod
    def _check_regrows(cls, every: int | None, info: ValidationInfo) -> int | None:
        if not info.data.get("regrow", 1):
            raise ValueError("applies only with regrow.")
        return every

    @field_validator("schedule", "initial_sparsity", check_fields=False)
    @classmethod
    def _check_schedule(cls, value: str | float, info: ValidationInfo) -> str | float:
        data = info.data
        trains = data.get("end", 0) is not None
        if not trains and data.get("steps") in {1, "each"}:
            raise ValueError("applies only with 2 steps or more, or with end.")
        if trains and fixed_sparsity(data) is not None and value not in {"one-shot", 0.0}:
            raise ValueError(
                f'"{data["pattern"].name}" fixes the sparsity: only schedule "one-shot" is '
                "possible, from 0."
            )
        if trains and value == "one-shot" and data.get("every") is not None:
            raise ValueError('"one-shot" prunes once, at end; remove the key every.')
        if isinstance(value, float) and value > _final(data):
            raise ValueError(f"{value:g} is above the final sparsity.")
        return value

    @field_validator(*ONLY_BEFORE_TRAINING, check_fields=False)
    @classmethod
    def _check_not_training(cls, value: object, info: ValidationInfo) -> object:
        if value not in {None, False, "none"} and info.data.get("end") is not None:
            reason = ONLY_BEFORE_TRAINING[info.field_name or ""]
            raise ValueError(f"end prunes while training, and {reason}; remove this key.")
        return value

    def without_effect(self) -> dict[str, None]:
        """Return the keys without effect, as None, for a dump."""
        keys = [] if self.regrow else ["regrow"]
        trains = self.end is not None
        if trains:
            keys += ["steps", "measure_error"]
        if fixed_sparsity(self.__dict__) is not None or (not trains and self.steps in {1, "each"}):
            keys += ["schedule", "initial_sparsity"]
        return dict.fromkeys(keys)


def fixed_sparsity(data: Mapping[str, Any]) -> float | None:
    """Return the sparsity that the pattern fixes, or None."""
    return getattr(data.get("pattern"), "sparsity", None)


def _final(data: Mapping[str, Any]) -> float:
    """Return the sparsity of a table; 1 if it is invalid."""
    if (sparsity := data.get("sparsity")) is not None:
        return sparsity
    return 1 - (data.get("parameters") or 0.0)
