"""The table of quality gates of a pruned model."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from prunekit.config.evaluate_table import Evaluate
from prunekit.config.structured_table import StructuredPrune
from prunekit.config.tables import Section


class Gates(Section):
    """Limits that the pruned model has to keep, by the run's measures."""

    perplexity_increase: float | None = Field(default=None, ge=0)
    """Largest relative rise of the perplexity on each text of [evaluate]: 0.1 allows 10 %."""
    accuracy_drop: float | None = Field(default=None, ge=0, le=1)
    """Largest loss of accuracy or exact match on the data or tasks of [evaluate], as a fraction of
    the samples: 0.01 allows one point of a hundred."""
    sparsity_gap: float | None = Field(default=None, ge=0, le=1)
    """Largest distance of the sparsity that is written from prune.sparsity, or of the parameters
    that are left from prune.parameters."""
    layer_error: float | None = Field(default=None, ge=0)
    """Largest relative error of a linear layer's output, before any training."""
    on_fail: Literal["fail", "keep"] = "fail"
    """fail: the run fails, with exit code 1, and is not uploaded; its checkpoint and report are
    there. keep: the report says which limits are not met, and nothing else happens."""

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {key: value for key, value in self.model_dump().items() if isinstance(value, float)}

    def mistakes(self, tables: Mapping[str, Any]) -> dict[str, str]:
        """Return limits that the run will not measure, with the reason.

        Args:
            tables: The other tables of the config; those that are invalid are missing.
        """
        return {key: why for key, why in _unmeasured(tables) if key in self.limits}


def _unmeasured(tables: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each limit that a run does not measure, with the reason."""
    if "evaluate" in tables:
        yield from _unevaluated(tables["evaluate"])
    prune = tables.get("prune")
    if isinstance(prune, StructuredPrune):
        yield "layer_error", "units are removed: what is left has no error of a layer."
        if prune.parameters_of == "blocks":
            yield "sparsity_gap", 'does not apply with parameters_of = "blocks".'
    elif prune is not None and prune.end is not None:
        yield "layer_error", "a model that is pruned while it trains has no such error."
    elif prune is not None and not (tables.get("calibration") and prune.measure_error):
        yield "layer_error", "needs [calibration] and measure_error, which measure it."


def _unevaluated(evaluate: Evaluate | None) -> Iterator[tuple[str, str]]:
    """Yield limits on measures that ``[evaluate]`` does not take."""
    if evaluate is None:
        reason = "is measured on the data of [evaluate], and there is no such table."
        yield from (("perplexity_increase", reason), ("accuracy_drop", reason))
    elif evaluate.task or not evaluate.data:
        yield "perplexity_increase", "of these data accuracy is measured; use accuracy_drop."
    elif not evaluate.tasks:
        yield "accuracy_drop", "without evaluate.task or tasks perplexity is measured."
