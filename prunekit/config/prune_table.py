"""``[prune]`` of runs that set weights to zero."""

import re
from collections.abc import Mapping
from math import isclose
from typing import Annotated, Any, Literal, Self

from pydantic import (
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
from prunekit.config.tables import MOST_STEPS
from prunekit.config.toml_source import quoted
from prunekit.errors import ConfigError
from prunekit.formatting import did_you_mean
from prunekit.methods import Method, Propagation, methods
from prunekit.methods.refine import Refine
from prunekit.methods.target import Target
from prunekit.patterns import Pattern, WeightScope
from prunekit.patterns.n_of_m import NOfM
from prunekit.statistics import Starved

Recover = Literal["block", "lowrank"]
Permute = Literal[False, True, "residual"]
DEFAULT_METHOD = "admm"
"""The method of a [prune] that names none."""
METHODS, ALLOCATIONS = PluginField(methods), PluginField(allocations)


def calibration_user(
    settings: Mapping[str, object],
    method: Method | type[Method] | None,
    allocation: Allocation | type[Allocation] | None,
) -> str | None:
    """Return the setting of ``[prune]`` that needs calibration text, or None.

    Args:
        settings: The keys of the table, before or after validation.
        method: The method that the table names; None if it is unknown.
        allocation: The allocation that the table names; None if it is unknown.
    """
    users = {
        "target dense": settings.get("target") == "dense",
        f"recover {settings.get('recover')}": settings.get("recover"),
        "permute": settings.get("permute"),
        f"refine {settings.get('refine')}": settings.get("refine"),
        f"method {method and method.name}": method and method.needs,
        f"allocation {allocation and allocation.name}": allocation and allocation.needs,
    }
    return next((user for user, needed in users.items() if needed), None)


class Prune(GradualKeys):
    """Weights to prune, the method, and its settings as further keys."""

    method: Annotated[Method, METHODS] = Field(DEFAULT_METHOD, validate_default=True)  # pyright: ignore
    """Name of the method; "prunekit list" shows all with their settings."""
    pattern: Pattern = Field("unstructured", validate_default=True)  # pyright: ignore
    """Allowed positions of zeros: unstructured, n:m (n kept of every m inputs), block:RxC, row,
    column."""
    scope: WeightScope | None = None
    """Which weights compete with each other if unstructured: those of a row, of a layer, or of a
    block of 128 columns. Default: as the method was published."""
    sparsity: float = Field(default=None, validate_default=True, ge=0, le=1)  # pyright: ignore
    """Fraction of zeros, 0 to 1; an n:m pattern has its own, which may be repeated here."""
    allocation: Annotated[Allocation, ALLOCATIONS] = Field("uniform", validate_default=True)  # pyright: ignore
    """How the sparsity is distributed over layers: a name, or a table of name and settings."""
    skip: list[str] = Field(default=[])
    """Names of layers that stay dense, with * and ?; embeddings and lm_head always do."""
    propagation: Propagation = Field(default=None, validate_default=True)  # pyright: ignore
    """When calibration inputs come from the layers pruned so far: "stage", from the next stage of
    the block on; "block", from the next block on; "none", never: all statistics are those of the
    dense model, and several processes prune whole blocks in parallel. "stage" runs a block about
    one and a half times and caches its attention outputs in addition to the hidden states; "block"
    and "none" run it twice. Default: stage for admm and alps, block for methods published that
    way."""
    steps: int = Field(default=1, ge=1, le=MOST_STEPS)
    """Number of steps in which the sparsity is reached; each gathers new statistics."""
    end: End = None
    start: Start = None
    every: Every = None
    schedule: ScheduleName = "cubic"
    """Sparsity over the steps: those of this table, or from start to end those of the optimizer.
    Only with 2 steps or more, or with end; an n:m pattern has "one-shot"."""
    initial_sparsity: float = Field(default=0.0, ge=0, le=1)
    """Sparsity at which the schedule starts; only with 2 steps or more, or with end."""
    regrow: Regrow = 0.0
    regrow_every: RegrowEvery = None
    on_indivisible: Literal["error", "skip"] = "error"
    """Action for a layer whose shape is not divisible as the pattern needs: refuse the run, or
    leave the layer dense."""
    refine: Refine | None = None
    """Optimization of the kept weights after the method has chosen them. pcg: conjugate gradients
    that minimize the error of the layer's output under the given mask; needs calibration."""
    target: Target = Field(default=None, validate_default=True)  # pyright: ignore
    """Layer output that the kept weights reconstruct. layer: output of the dense weights on the
    inputs from the pruned model. dense: output of the layer in the dense model, so that errors of
    earlier layers are corrected too; holds the dense model's hidden states and one more Gram
    matrix, runs each block twice, needs calibration. Default: dense for admm in one step; layer for
    the other methods, as published. Experts always use layer."""
    starved: Starved = "all-tokens"
    """Action for an expert to which fewer than starved_below calibration tokens are routed.
    all-tokens: gather its statistics from all tokens, in one more forward of the block. magnitude:
    prune it by magnitude. error: stop and name it. The report shows it for each expert."""
    starved_below: int = Field(default=64, ge=1)
    """Tokens below which an expert counts as starved; 64 tokens determine the mean square of an
    input to about a sixth."""
    recover: Recover | None = None
    """Recovery from the pruning error. block: tune the kept weights of all linears of a block
    together, with fixed masks, towards the output of that block in the dense model; 200 steps of
    Adam on the calibration text, without labels; holds the dense model's hidden states and four
    float32 copies of the block's weights. lowrank: approximate the pruned part of each linear by a
    product of two thin matrices, written as a LoRA adapter for peft to the subfolder "adapter" of
    the output; slower at inference. Both need calibration."""
    recover_rank: int = Field(default=64, ge=1)
    """Rank of the adapter of recover = "lowrank"."""
    permute: Permute = False
    """For n:m: reorder neurons, and channels within heads, so that the pattern loses least.
    residual: reorder the residual stream too, with one permutation for the whole model. All weights
    that write or read the reordered features are permuted together, so the dense model computes
    the same function. Takes one or two more forwards of each block; needs calibration."""
    measure_error: bool = True
    """Report the relative error of every layer; needs [calibration]. For methods that do not use
    the Gram matrix, it is gathered for this from one sample in four."""

    @property
    def calibration_user(self) -> str | None:
        """The setting that needs calibration text, such as "method wanda", or None."""
        settings = {key: getattr(self, key) for key in type(self).model_fields}
        return calibration_user(settings, self.method, self.allocation)

    @model_validator(mode="before")
    @classmethod
    def _nest_method_settings(cls, values: object) -> object:
        return nest_method_settings(values, cls.model_fields, methods(), DEFAULT_METHOD)

    @field_validator("pattern", mode="plain", json_schema_input_type=str)
    @classmethod
    def _parse_pattern(cls, text: object, info: ValidationInfo) -> Pattern:
        if not isinstance(text, str):
            message = f'{quoted(text)} is not text in quotes, such as "2:4".'
            raise ValueError(message)  # noqa: TRY004  pydantic needs a ValueError
        method = info.data.get("method")
        try:
            return patterns.parse(text, method.scope if method else "row")
        except ConfigError as error:
            words = re.findall(r"[\w:]+", " ".join(patterns.spellings()))
            raise ValueError(f"{error}{did_you_mean(text, words)}") from None

    @field_validator("scope")
    @classmethod
    def _check_scope(cls, scope: WeightScope | None, info: ValidationInfo) -> WeightScope | None:
        pattern = info.data.get("pattern")
        if scope and pattern and pattern.name != "unstructured":
            raise ValueError(f'applies to "unstructured" only, not to "{pattern.name}".')
        return scope

    @model_validator(mode="after")
    def _apply_scope(self) -> Self:
        if self.scope:
            object.__setattr__(self, "pattern", patterns.parse(self.pattern.name, self.scope))
        return self

    @field_validator("sparsity", mode="before")
    @classmethod
    def _check_sparsity(cls, value: object, info: ValidationInfo) -> object:
        pattern = info.data.get("pattern")
        if pattern is None:  # invalid, reported already; this key cannot be checked without it
            return 0.0 if value is None else value
        if value is None and pattern.sparsity is None:
            raise ValueError(f'missing. "{pattern.name}" needs a fraction from 0 to 1.')
        known = pattern.sparsity
        if isinstance(value, int | float) and known is not None and not isclose(value, known):
            raise ValueError(f'"{pattern.name}" fixes the sparsity at {known:g}; remove this key.')
        agrees = isinstance(value, int | float) and not isinstance(value, bool)
        return known if value is None or (agrees and known is not None) else value

    @field_validator("allocation")
    @classmethod
    def _check_allocation(cls, allocation: Allocation, info: ValidationInfo) -> Allocation:
        method, pattern = info.data.get("method"), info.data.get("pattern")
        name, supported = allocation.name, allocation.methods
        if method and supported is not None and method.name not in supported:
            only = ", ".join(sorted(supported))
            raise ValueError(f'"{name}" is defined for the scores of {only}, not of {method.name}.')
        scope = getattr(pattern, "scope", None)
        if name == "global" and pattern and scope != "layer":
            found = f'scope "{scope}"' if scope else f'"{pattern.name}"'
            raise ValueError(f'"global" needs one threshold per layer; {found} has several.')
        mixes = allocation.mixes or isinstance(allocation, Uniform)
        if pattern and pattern.sparsity is not None and not mixes:
            raise ValueError(
                f'"{pattern.name}" fixes one sparsity for all layers; remove "{name}".'
            )
        return allocation

    @field_validator("propagation", mode="before")
    @classmethod
    def _default_propagation(cls, value: object, info: ValidationInfo) -> object:
        # An invalid method is reported already; the base class stands in for it.
        kind = info.data.get("method", Method)
        return kind.propagation if value is None else value

    @field_validator("steps")
    @classmethod
    def _check_steps(cls, steps: int, info: ValidationInfo) -> int:
        pattern = info.data.get("pattern")
        if steps > 1 and pattern and pattern.sparsity is not None:
            raise ValueError(f'"{pattern.name}" fixes the sparsity, so only 1 step is possible.')
        if steps > 1 and info.data.get("propagation") == "none":
            raise ValueError('propagation "none" allows only 1 step: later ones would not differ.')
        return steps

    @field_validator("target", mode="before")
    @classmethod
    def _check_target(cls, value: object, info: ValidationInfo) -> object:
        several_steps = info.data.get("steps", 1) > 1
        dense_inputs = info.data.get("propagation") == "none"
        if value is None:
            layer = several_steps or dense_inputs
            return "layer" if layer else info.data.get("method", Method).target
        if value == "dense" and dense_inputs:
            raise ValueError('propagation "none" has the target "dense" anyway; remove this key.')
        if value == "dense" and several_steps:
            raise ValueError('"dense" allows only 1 step: later ones lack the dense weights.')
        return value

    @field_validator("recover")
    @classmethod
    def _check_recover(cls, recover: Recover | None, info: ValidationInfo) -> Recover | None:
        if recover and info.data.get("steps", 1) > 1:
            raise ValueError(
                f'"{recover}" allows only 1 step: it runs once, when a block is pruned.'
            )
        return recover

    @field_validator("recover_rank")
    @classmethod
    def _check_recover_rank(cls, rank: int, info: ValidationInfo) -> int:
        if info.data.get("recover") != "lowrank":
            raise ValueError('applies only with recover = "lowrank".')
        return rank

    @field_validator("permute")
    @classmethod
    def _check_permute(cls, permute: Permute, info: ValidationInfo) -> Permute:
        pattern = info.data.get("pattern")
        if permute and pattern and not isinstance(pattern, NOfM):
            raise ValueError(f'applies to n:m patterns only, not to "{pattern.name}".')
        return permute

    @model_serializer
    def _serialize(self) -> dict[str, Any]:
        settings = self.method.model_dump(mode="json")
        allocation = self.allocation.model_dump(mode="json")
        values = {name: getattr(self, name) for name in type(self).model_fields}
        values |= {"method": self.method.name, **settings, "pattern": self.pattern.name}
        values["scope"] = getattr(self.pattern, "scope", None)
        values["allocation"] = self.allocation.name
        if allocation:
            values["allocation"] = {"name": self.allocation.name, **allocation}
        if self.pattern.sparsity is not None:
            values["sparsity"] = None
        values |= self.without_effect()
        for key in ("starved", "starved_below"):  # most models have no experts
            if values[key] == Prune.model_fields[key].default:
                values[key] = None
        if self.recover != "lowrank":
            values["recover_rank"] = None
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return flattened_schema(cls, METHODS, handler.resolve_ref_schema(handler(core)), handler)
