"""``[prune]`` where its pattern names units that are taken out whole: blocks, heads, neurons."""

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

from prunekit.config.plugin_field import PluginField
from prunekit.config.prune_table import gather_settings, keys_beside
from prunekit.config.tables import Section, as_list
from prunekit.config.toml_source import shown
from prunekit.models.units.kinds import KINDS, WHOLE, Compensation, Kind
from prunekit.structured.rankers import Ranker, rankers

RANKERS = PluginField(rankers)


def names_units(prune: object) -> bool:
    """Say whether a ``[prune]``, as it is written, is about units and not about weights."""
    pattern = prune.get("pattern") if isinstance(prune, dict) else None
    return isinstance(pattern, list) or pattern in KINDS


def _steps(steps: object) -> object:
    if steps == "each" or (type(steps) is int and steps >= 1):
        return steps
    raise ValueError(f'{shown(steps)} is neither a whole number of at least 1 nor "each".')


class Shrink(Section):
    """What is taken out whole and how; the settings of the ranker stand beside these keys."""

    method: Annotated[Ranker, RANKERS]
    """Name of the ranker, which says what goes first; "prunekit list" shows all with their
    settings."""
    pattern: Annotated[
        list[Kind],
        BeforeValidator(as_list, json_schema_input_type=Kind | list[Kind]),
        Field(min_length=1),
    ]
    """What goes: whole blocks, hidden (coordinates of the residual stream), heads (under grouped
    queries a key head with its query heads), neurons, or a list of several; those named later here
    are ranked in what the earlier leave."""
    parameters: float | None = Field(default=None, gt=0, le=1)
    """Fraction of the model's parameters that stays at most, in place of sparsity: units of all
    kinds go together, those first whose score is lowest for the parameters that they take."""
    sparsity: float | None = Field(default=None, ge=0, lt=1, validate_default=True)
    """Fraction of the units of each kind that go, from 0 up to 1."""
    uniform: bool = False
    """Every layer keeps equally many, so that a stock config.json can say it; where it cannot, the
    plan is refused."""
    scope: Literal["global", "layer"] = Field(default=None, validate_default=True)  # pyright: ignore
    """Which units are compared with each other: those of all layers, or those of each layer, which
    then keeps the same part; unless said, global, and layer if uniform."""
    least: int = Field(default=1, ge=1)
    """Units that every layer keeps."""
    round_to: int = Field(default=1, ge=1)
    """Every width that the units which stay make up (their features, for heads) is rounded up to a
    multiple of this, so that fewer may go than asked for; 64 is what GPUs multiply fastest. Of
    hidden dimensions as many stay at least as transformers can divide among the heads."""
    steps: Annotated[
        int | Literal["each"],
        PlainValidator(
            _steps, json_schema_input_type=Annotated[int, Field(ge=1)] | Literal["each"]
        ),
    ] = 1
    """In how many steps the sparsity is reached; what is left is ranked anew for each. each: one
    unit a step, or one of every layer."""
    schedule: Literal["one-shot", "linear", "cubic"] = "cubic"
    """Sparsity over the steps, if there are several."""
    compensate: Compensation = Field(default=None, validate_default=True)  # pyright: ignore
    """What makes up for what goes. refit: the linear that reads the units is fitted anew, block
    after block, to what it gave with all of them on the calibration text; bias: what the units that
    go give on average there is added to its bias, where the family has one; none: nothing. Unless
    said, as suits the ranker."""

    truth: bool = False
    """Hold the ranker against what the loss is without each unit, by Spearman's rank correlation:
    a run of the model on 512 tokens for each unit, shown in the report; changes nothing else."""

    @model_validator(mode="before")
    @classmethod
    def _gather_settings(cls, values: object) -> object:
        return gather_settings(values, cls.model_fields, rankers())

    @field_validator("pattern")
    @classmethod
    def _once_each(cls, pattern: list[Kind], info: ValidationInfo) -> list[Kind]:
        ranker = info.data.get("method")
        for kind in pattern:
            if pattern.count(kind) > 1:
                raise ValueError(f'"{kind}" is there twice.')
            for part in ranker.parts if ranker else []:
                if kind not in part.kinds:
                    ranked = " and ".join(sorted(part.kinds))
                    raise ValueError(f"{part.name} ranks {ranked}, not {kind}.")
        return pattern

    @field_validator("sparsity")
    @classmethod
    def _one_of_both(cls, sparsity: float | None, info: ValidationInfo) -> float | None:
        # A mistake in parameters is said, and whether this key is missing cannot be judged.
        budget = info.data.get("parameters", 1.0)
        if sparsity is None and budget is None:
            raise PydanticKnownError("missing")
        if sparsity is not None and info.data.get("parameters") is not None:
            raise ValueError("parameters is there too; say one of both.")
        return sparsity

    @field_validator("scope", mode="before")
    @classmethod
    def _as_uniform(cls, scope: object, info: ValidationInfo) -> object:
        uniform = info.data.get("uniform")
        if scope == "global" and uniform:
            raise ValueError('"global" leaves layers of different sizes; uniform = true does not.')
        return ("layer" if uniform else "global") if scope is None else scope

    @field_validator("steps")
    @classmethod
    def _of_units(cls, steps: int | str, info: ValidationInfo) -> int | str:
        if steps == "each" and info.data.get("parameters") is not None:
            raise ValueError('"each" is for sparsity; with parameters, say a number.')
        return steps

    @field_validator("schedule")
    @classmethod
    def _over_steps(cls, schedule: str, info: ValidationInfo) -> str:
        if info.data.get("steps") in {1, "each"}:
            raise ValueError("has a meaning only with steps of 2 or more.")
        return schedule

    @field_validator("compensate", mode="before")
    @classmethod
    def _of_the_ranker(cls, compensate: object, info: ValidationInfo) -> object:
        # Without a ranker its mistake is said, and this key cannot be judged.
        kind = info.data.get("method", Ranker)
        whole = WHOLE.issuperset(info.data.get("pattern", KINDS))
        if compensate in {"refit", "bias"} and whole:
            raise ValueError(f'"{compensate}" is for what reads heads or neurons; none of them go.')
        if compensate is None:
            return "none" if whole else kind.compensate
        return compensate

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        object.__setattr__(self, "pattern", [kind for kind in KINDS if kind in self.pattern])
        return self

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in type(self).model_fields}
        values |= {"method": self.method.name, **self.method.model_dump(mode="json")}
        if self.steps in {1, "each"}:
            del values["schedule"]
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return keys_beside(cls, RANKERS, handler.resolve_ref_schema(handler(core)), handler)


class Train(Section):
    """Training of what is left, on the calibration text, before it is written."""

    steps: int = Field(default=500, ge=1)
    """Steps at most."""
    rate: float = Field(default=5e-5, gt=0)
    """Learning rate of AdamW, which it rises to and then falls from along a cosine."""
    batch: int = Field(default=4, ge=1)
    """Calibration samples that a step reads."""
    held_out: int = Field(default=16, ge=1)
    """The last so many calibration samples are not trained on: it is judged by them when to stop,
    and the weights that were best there are taken."""
    every: int = Field(default=50, ge=1)
    """Steps between two looks at the held-out samples."""
    patience: int = Field(default=5, ge=1)
    """Looks without a gain after which it stops."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of batches."""
