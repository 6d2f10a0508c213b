"""Stock models without weights, built from a changed config."""

from collections.abc import Mapping
from typing import Any

from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from prunekit.checkpoint.compressed import KEPT_UNITS_KEY
from prunekit.errors import ShapeError
from prunekit.models.units.config_entries import with_entries

FAILURES = (
    StrictDataclassError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Raised by the code of a family for a config that it cannot have."""


def meta_model(model: PreTrainedModel, entries: Mapping[str, Any], kind: str) -> PreTrainedModel:
    """Build the stock model of a config with changed entries.

    Its parameters are on the meta device; its buffers are real.

    Args:
        model: Only its class and config are used, without the record of kept units.
        entries: Changed entries of ``config.json``, by full names.
        kind: Kind of the units being removed, for the message.

    Raises:
        ShapeError: transformers refuses the config.
    """
    changed = with_entries(model.config.to_dict(), entries)
    for key in (KEPT_UNITS_KEY, "quantization_config"):
        changed.pop(key, None)
    try:
        config = type(model.config).from_dict(changed)
        with init_empty_weights(include_buffers=False):
            return type(model)._from_config(config).eval()
    except FAILURES as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise ShapeError(
            f"{kind}: transformers refuses a config with {format_entries(entries)}: {reason}"
        ) from error


def format_entries(entries: Mapping[str, Any]) -> str:
    """Return config entries as text for a message."""
    return ", ".join(f"{name} = {value}" for name, value in entries.items())
