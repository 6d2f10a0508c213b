"""``[prune]`` of runs that remove whole units.

Units are blocks, hidden dimensions, experts, heads and neurons.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticKnownError

from prunekit.config.gradual_keys import (
    End,
    Every,
    GradualKeys,
    Regrow,
    RegrowEvery,
    ScheduleName,
    Start,
)
from prunekit.config.plugin_field import PluginField
from prunekit.config.plugin_table import flattened_schema, nest_method_settings
from prunekit.config.tables import MOST_STEPS, as_list
from prunekit.config.toml_source import quoted
from prunekit.models.units.kinds import KINDS, WHOLE, Compensation, Counted, Kind
from prunekit.structured.rankers import Ranker, rankers

RANKERS = PluginField(rankers)


def prunes_units(prune: object) -> bool:
    """Return whether the pattern of an unvalidated ``[prune]`` names units."""
    pattern = prune.get("pattern") if isinstance(prune, dict) else None
    return isinstance(pattern, list) or pattern in KINDS


def _parse_steps(steps: object) -> object:
    if steps == "each" or (type(steps) is int and 1 <= steps <= MOST_STEPS):
        return steps
    raise ValueError(
        f'{quoted(steps)} is neither a whole number from 1 to {MOST_STEPS:,} nor "each".'
    )


class StructuredPrune(GradualKeys):
    """Units to remove, the ranker, and its settings as further keys."""

    method: Annotated[Ranker, RANKERS]
    """Name of the ranker, which scores units; those with the lowest scores are removed first.
    "prunekit list" shows all rankers with their settings."""
    pattern: Annotated[
        list[Kind],
        BeforeValidator(as_list, json_schema_input_type=Kind | list[Kind]),
        Field(min_length=1),
    ]
    """Kinds of units to remove: blocks (whole blocks), hidden (dimensions of the residual stream),
    experts (of a mixture, whose router then chooses among the others), heads (under grouped-query
    attention a key head with its query heads), neurons, or a list of several. Kinds later in this
    order are ranked in the model without the removed units of the earlier kinds."""
    parameters: float | None = Field(default=None, gt=0, le=1)
    """Largest fraction of the model's parameters to keep, instead of sparsity. Units of all kinds
    compete: those with the lowest score per parameter are removed first."""
    parameters_of: Counted = "model"
    """Parameters that this fraction counts: those of the whole model, or those of its blocks,
    embeddings and head left out. Only with parameters."""
    sparsity: float | None = Field(default=None, ge=0, lt=1, validate_default=True)
    """Fraction of the units of each kind to remove, from 0 up to 1."""
    uniform: bool = False
    """Keep equally many units in every layer, so that a standard config.json can describe the
    model; a plan for which that is not possible is refused."""
    scope: Literal["global", "layer"] = Field(default=None, validate_default=True)  # pyright: ignore
    """Which units compete with each other: those of all layers, or those of one layer, so that
    every layer keeps the same fraction. Default: layer if uniform or if experts are removed, of
    which a config has one number for all layers, else global."""
    least: int = Field(default=1, ge=0)
    """Fewest units that every layer keeps. With 0 an attention or feed-forward may lose all: then
    it is taken out, and only the bias of its output is left. Of blocks and hidden dimensions at
    least one is always kept."""
    round_to: int = Field(default=1, ge=1)
    """Round every kept width (of heads: their number of features) up to a multiple of this, so that
    fewer units may be removed than requested; GPUs multiply fastest with multiples of 64. Of hidden
    dimensions at least as many are kept as transformers can divide among the heads."""
    steps: Annotated[
        int | Literal["each"],
        PlainValidator(
            _parse_steps,
            json_schema_input_type=Annotated[int, Field(ge=1, le=MOST_STEPS)] | Literal["each"],
        ),
    ] = 1
    """Number of steps in which the sparsity is reached; the remaining units are ranked again for
    each. each: remove one unit per step, or one of every layer."""
    end: End = None
    start: Start = None
    every: Every = None
    schedule: ScheduleName = "cubic"
    """Sparsity over the steps: those of this table, or from start to end those of the optimizer.
    Only with 2 steps or more, or with end."""
    initial_sparsity: float = Field(default=0.0, ge=0, lt=1)
    """Sparsity at which the schedule starts; only with 2 steps or more, or with end."""
    regrow: Regrow = 0.0
    regrow_every: RegrowEvery = None
    compensate: Compensation = Field(default=None, validate_default=True)  # pyright: ignore
    """Compensation for removed units. refit: refit the linear whose inputs the units are, block by
    block, to its output with all units on the calibration text. bias: add the average contribution
    of the removed units to its bias, if the model family has one. none: no compensation. Default:
    as suits the ranker."""

    truth: bool = False
    """Compare the ranker with the loss measured without each unit, by Spearman's rank correlation:
    one forward of the model on 512 tokens for each unit. It is reported only; the result does not
    change."""

    @model_validator(mode="before")
    @classmethod
    def _nest_method_settings(cls, values: object) -> object:
        return nest_method_settings(values, cls.model_fields, rankers())

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: list[Kind], info: ValidationInfo) -> list[Kind]:
        ranker = info.data.get("method")
        for kind in pattern:
            if pattern.count(kind) > 1:
                raise ValueError(f'"{kind}" is listed twice.')
            for part in ranker.components if ranker else []:
                if kind not in part.kinds:
                    ranked = " and ".join(sorted(part.kinds))
                    raise ValueError(f"{part.name} ranks {ranked}, not {kind}.")
        return pattern

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, sparsity: float | None, info: ValidationInfo) -> float | None:
        # An invalid value of parameters is reported already; then this key is not missing.
        budget = info.data.get("parameters", 1.0)
        if sparsity is None and budget is None:
            raise PydanticKnownError("missing")
        if sparsity is not None and info.data.get("parameters") is not None:
            raise ValueError("parameters is set too; remove one of both.")
        return sparsity

    @field_validator("parameters_of")
    @classmethod
    def _check_parameters_of(cls, of: Counted, info: ValidationInfo) -> Counted:
        if of != "model" and info.data.get("parameters", 1.0) is None:
            raise ValueError("says what parameters counts, and that key is not set.")
        return of

    @field_validator("scope", mode="before")
    @classmethod
    def _default_scope(cls, scope: object, info: ValidationInfo) -> object:
        uniform = info.data.get("uniform")
        if scope == "global" and uniform:
            raise ValueError('"global" makes layers of different sizes; uniform = true forbids it.')
        experts = "experts" in info.data.get("pattern", ())
        if scope == "global" and experts:
            raise ValueError('"global" leaves layers with unequal experts, and no config says so.')
        return ("layer" if uniform or experts else "global") if scope is None else scope

    @field_validator("steps")
    @classmethod
    def _check_steps(cls, steps: int | str, info: ValidationInfo) -> int | str:
        if steps == "each" and info.data.get("parameters") is not None:
            raise ValueError('"each" needs sparsity; with parameters, write a number.')
        return steps

    @field_validator("compensate", mode="before")
    @classmethod
    def _default_compensate(cls, compensate: object, info: ValidationInfo) -> object:
        # An invalid ranker is reported already; the base class stands in for it.
        kind = info.data.get("method", Ranker)
        whole = WHOLE.issuperset(info.data.get("pattern", KINDS))
        if compensate in {"refit", "bias"} and whole:
            raise ValueError(f'"{compensate}" needs heads or neurons to be removed; none are.')
        if compensate is None:
            once = info.data.get("end") is None
            return kind.compensate if once and not whole else "none"
        return compensate

    @model_validator(mode="after")
    def _sort_pattern(self) -> Self:
        object.__setattr__(self, "pattern", [kind for kind in KINDS if kind in self.pattern])
        return self

    @model_serializer
    def _serialize(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in type(self).model_fields}
        values |= {"method": self.method.name, **self.method.model_dump(mode="json")}
        values |= self.without_effect()
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return flattened_schema(cls, RANKERS, handler.resolve_ref_schema(handler(core)), handler)
