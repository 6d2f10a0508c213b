"""TODO-DOC prunekit/config/prune_table.py (out of prunekit/sections.py)."""

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

from prunekit import patterns
from prunekit.allocations import Allocation, allocations
from prunekit.allocations.uniform import Uniform
from prunekit.config.messages import did_you_mean
from prunekit.config.plugin_field import PluginField
from prunekit.config.tables import Section
from prunekit.config.toml_source import shown
from prunekit.errors import ConfigError
from prunekit.methods import Method, Propagation, methods
from prunekit.methods.refine import Refine
from prunekit.methods.target import Target
from prunekit.patterns import Pattern, Scope
from prunekit.patterns.n_of_m import NOfM
from prunekit.statistics import Starved

Recover = Literal["block", "lowrank"]
Permute = Literal[False, True, "residual"]
METHODS, ALLOCATIONS = PluginField(methods), PluginField(allocations)


def gather_settings(
    values: object, ours: Collection[str], kinds: Mapping[str, type[BaseModel]]
) -> object:
    """Move the keys that are not ``ours`` to the method, which says which ones it knows."""
    if not isinstance(values, dict):
        return values
    own = {key: value for key, value in values.items() if key in ours}
    others = {key: value for key, value in values.items() if key not in ours}
    name = values.get("method")
    if isinstance(name, str) and name in kinds:
        return {**own, "method": {"name": name, **others}}
    # Without a method it does not show whose settings they are; what nobody knows does.
    known = {setting for kind in kinds.values() for setting in kind.model_fields}
    return own | {key: value for key, value in others.items() if key not in known}


def keys_beside(
    section: type[BaseModel],
    choice: PluginField,
    shared: dict[str, Any],
    handler: GetJsonSchemaHandler,
) -> dict[str, Any]:
    """Return the JSON schema of a section whose methods have their settings beside its own keys."""
    tables = choice.tables("method", handler)
    for table in tables:
        table["properties"] = {**shared["properties"], **table["properties"]}
        table["required"] = [*shared["required"], *table["required"][1:]]
    return {"description": section.__doc__, "oneOf": tables}


class Prune(Section):
    """What is pruned and how; the settings of the method stand beside these keys."""

    method: Annotated[Method, METHODS]
    """Name of the method; "prunekit list" shows all with their settings."""
    pattern: Pattern
    """Where zeros may be: unstructured, n:m (n kept of every m inputs), block:RxC, row, column."""
    scope: Scope | None = None
    """Which weights are compared with each other if unstructured: those of a row, of a layer, or of
    a block of 128 columns; unless said, as the method was published."""
    sparsity: float = Field(default=None, validate_default=True, ge=0, le=1)  # pyright: ignore
    """Fraction of zeros, 0 to 1; n:m fixes its own."""
    allocation: Annotated[Allocation, ALLOCATIONS] = Field("uniform", validate_default=True)  # pyright: ignore
    """How the sparsity is spread over layers: a name, or a table of name and settings."""
    skip: list[str] = Field(default=[])
    """Names of layers that stay dense, with * and ?; embeddings and lm_head always do."""
    propagation: Propagation = Field(default=None, validate_default=True)  # pyright: ignore
    """How soon layers see the pruned ones before them: from the next stage on, or from the next
    block on, or not at all (none: statistics of the dense model; several processes then prune whole
    blocks, each its own). By stage a block is run about one and a half times, and what its
    attention gives is held beside the hidden states; by block and none twice. Unless said, what
    suits the method: stage for admm and alps, block for those published so."""
    steps: int = Field(default=1, ge=1)
    """In how many steps the sparsity is reached; statistics are gathered anew for each."""
    schedule: Literal["one-shot", "linear", "cubic"] = "cubic"
    """Sparsity over the steps, if there are several."""
    initial_sparsity: float = Field(default=0.0, ge=0, le=1)
    """Sparsity from which the steps start, if there are several."""
    on_indivisible: Literal["error", "skip"] = "error"
    """What to do with a layer whose shape the pattern does not divide."""
    refine: Refine | None = None
    """What is done to the weights that stay once the method has chosen them; pcg: conjugate
    gradients towards what the dense layer gives, so that any mask errs less; needs calibration."""
    target: Target = Field(default=None, validate_default=True)  # pyright: ignore
    """What the weights that stay aim at. layer: what the dense layer would make of the inputs that
    it has in the pruned model. dense: what it makes of its inputs in the dense model, so that what
    the layers before it do wrong is made up for; holds the dense model's hidden states and one more
    Gram matrix, and runs each block twice; needs calibration. Unless said, dense for admm in one
    step, and layer, as they were published, for the others; experts always aim at layer."""
    starved: Starved = "all-tokens"
    """What to do with an expert to which fewer than starved_below calibration tokens are routed.
    all-tokens: gather its statistics from all tokens, in one more forward of the block. magnitude:
    prune it by magnitude. error: stop and name it. Reported for each expert."""
    starved_below: int = Field(default=64, ge=1)
    """Tokens; of 64 the mean square of an input is known to about a sixth."""
    recover: Recover | None = None
    """What makes up for what pruning took. block: the kept weights of all linears of a block are
    tuned together, their masks as they are, until it gives what the dense model gives there: 200
    steps of Adam on the calibration text, which needs no labels; holds the dense model's hidden
    states and, of the block's weights, four copies in float32. lowrank: the best product of two
    thin matrices for each linear, written as a LoRA adapter for peft to the folder adapter beside
    the checkpoint; it costs time at inference. Both need calibration."""
    recover_rank: int = Field(default=64, ge=1)
    """Rank of the adapter of recover = "lowrank"."""
    permute: Permute = False
    """For n:m: put neurons, and channels within heads, in the order in which least is lost;
    residual: the coordinates of the residual stream too, in one order all through the model. What
    writes and what reads them changes together, so the dense model would give the same; a forward
    more of each block, or two; needs calibration."""
    measure_error: bool = True
    """Report every layer's relative error; needs [calibration]. Methods that do without the Gram
    matrix have it gathered for this from one sample in four."""

    @model_validator(mode="before")
    @classmethod
    def _gather_settings(cls, values: object) -> object:
        return gather_settings(values, cls.model_fields, methods())

    @field_validator("pattern", mode="plain", json_schema_input_type=str)
    @classmethod
    def _spelled(cls, text: object, info: ValidationInfo) -> Pattern:
        if not isinstance(text, str):
            message = f'{shown(text)} is not text in quotes, such as "2:4".'
            raise ValueError(message)  # noqa: TRY004  pydantic wants it
        method = info.data.get("method")
        try:
            return patterns.parse(text, method.scope if method else "row")
        except ConfigError as error:
            words = re.findall(r"[\w:]+", " ".join(patterns.spellings()))
            raise ValueError(f"{error}{did_you_mean(text, words)}") from None

    @field_validator("scope")
    @classmethod
    def _has_scope(cls, scope: Scope | None, info: ValidationInfo) -> Scope | None:
        pattern = info.data.get("pattern")
        if scope and pattern and pattern.name != "unstructured":
            raise ValueError(f'only "unstructured" has one, "{pattern.name}" has not.')
        return scope

    @model_validator(mode="after")
    def _scoped(self) -> Self:
        if self.scope:
            object.__setattr__(self, "pattern", patterns.parse(self.pattern.name, self.scope))
        return self

    @field_validator("sparsity", mode="before")
    @classmethod
    def _fixed_or_said(cls, value: object, info: ValidationInfo) -> object:
        pattern = info.data.get("pattern")
        if pattern is None:  # its mistake is said; this one cannot be judged
            return 0.0 if value is None else value
        if value is None and pattern.sparsity is None:
            raise ValueError(f'missing. "{pattern.name}" needs one, a fraction from 0 to 1.')
        if value is not None and pattern.sparsity is not None:
            fixed = f"{pattern.sparsity:g}"
            raise ValueError(f'"{pattern.name}" fixes the sparsity at {fixed}; remove this key.')
        return pattern.sparsity if value is None else value

    @field_validator("allocation")
    @classmethod
    def _fits(cls, allocation: Allocation, info: ValidationInfo) -> Allocation:
        method, pattern = info.data.get("method"), info.data.get("pattern")
        name, served = allocation.name, allocation.methods
        if method and served is not None and method.name not in served:
            only = ", ".join(sorted(served))
            raise ValueError(f'"{name}" stands for scores of {only}, not of {method.name}.')
        scope = getattr(pattern, "scope", None)
        if name == "global" and pattern and scope != "layer":
            found = f'scope "{scope}"' if scope else f'"{pattern.name}"'
            raise ValueError(f'"global" cuts whole layers by one threshold; {found} does not.')
        mixes = allocation.mixes or isinstance(allocation, Uniform)
        if pattern and pattern.sparsity is not None and not mixes:
            raise ValueError(f'"{pattern.name}" gives all layers one sparsity; remove "{name}".')
        return allocation

    @field_validator("propagation", mode="before")
    @classmethod
    def _of_the_method(cls, value: object, info: ValidationInfo) -> object:
        # Without a method its mistake is said, and this key cannot be judged.
        kind = info.data.get("method", Method)
        return kind.propagation if value is None else value

    @field_validator("steps")
    @classmethod
    def _can_step(cls, steps: int, info: ValidationInfo) -> int:
        pattern = info.data.get("pattern")
        if steps > 1 and pattern and pattern.sparsity is not None:
            raise ValueError(f'"{pattern.name}" has one sparsity only, so there is 1 step.')
        if steps > 1 and info.data.get("propagation") == "none":
            raise ValueError('propagation "none" goes with 1 step: later ones would see no change.')
        return steps

    @field_validator("target", mode="before")
    @classmethod
    def _as_measured(cls, value: object, info: ValidationInfo) -> object:
        several = info.data.get("steps", 1) > 1
        dense = info.data.get("propagation") == "none"
        if value is None:
            return "layer" if several or dense else info.data.get("method", Method).target
        if value == "dense" and dense:
            raise ValueError('"dense" is what propagation "none" aims at anyway; remove this key.')
        if value == "dense" and several:
            raise ValueError(
                '"dense" goes with 1 step: later ones no longer have the dense weights.'
            )
        return value

    @field_validator("recover")
    @classmethod
    def _in_one_step(cls, recover: Recover | None, info: ValidationInfo) -> Recover | None:
        if recover and info.data.get("steps", 1) > 1:
            raise ValueError(f'"{recover}" goes with 1 step: it is done once a block is pruned.')
        return recover

    @field_validator("recover_rank")
    @classmethod
    def _of_adapters(cls, rank: int, info: ValidationInfo) -> int:
        if info.data.get("recover") != "lowrank":
            raise ValueError('has a meaning only with recover = "lowrank".')
        return rank

    @field_validator("permute")
    @classmethod
    def _has_neighbours(cls, permute: Permute, info: ValidationInfo) -> Permute:
        pattern = info.data.get("pattern")
        if permute and pattern and not isinstance(pattern, NOfM):
            raise ValueError(f'only n:m counts among neighbours, "{pattern.name}" does not.')
        return permute

    @field_validator("schedule", "initial_sparsity")
    @classmethod
    def _over_steps(cls, value: str | float, info: ValidationInfo) -> str | float:
        if info.data.get("steps") == 1:
            raise ValueError("has a meaning only with steps of 2 or more.")
        if isinstance(value, float) and value > info.data.get("sparsity", 1):
            raise ValueError(f"{value:g} is above the sparsity to reach.")
        return value

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        own = self.method.model_dump(mode="json")
        spread = self.allocation.model_dump(mode="json")
        values = {name: getattr(self, name) for name in type(self).model_fields}
        values |= {"method": self.method.name, **own, "pattern": self.pattern.name}
        values["scope"] = getattr(self.pattern, "scope", None)
        values["allocation"] = self.allocation.name
        if spread:
            values["allocation"] = {"name": self.allocation.name, **spread}
        if self.pattern.sparsity is not None:
            values["sparsity"] = None
        if self.steps == 1:
            values["schedule"] = values["initial_sparsity"] = None
        for key in ("starved", "starved_below"):  # of which most models have nothing
            if values[key] == Prune.model_fields[key].default:
                values[key] = None
        if self.recover != "lowrank":
            values["recover_rank"] = None
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return keys_beside(cls, METHODS, handler.resolve_ref_schema(handler(core)), handler)
