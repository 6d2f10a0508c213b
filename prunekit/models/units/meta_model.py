"""The stock model that a changed config describes: its shapes, without weights."""

from collections.abc import Mapping
from typing import Any

from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from prunekit.checkpoint.compressed import RECORD
from prunekit.errors import ShapeError


def meta_model(model: PreTrainedModel, entries: Mapping[str, Any], what: str) -> PreTrainedModel:
    """Build the stock model that the config of ``model`` describes with other entries.

    Its parameters are on the meta device, its buffers are real.

    Args:
        model: Of which only class and config are read; what ``RECORD`` says is left out.
        entries: Entries of ``config.json`` and their values.
        what: What is being removed, for the message.

    Raises:
        ShapeError: transformers refuses the config.
    """
    said: dict[str, Any] = {**model.config.to_dict(), **entries}
    for ours in (RECORD, "quantization_config"):
        said.pop(ours, None)
    try:
        config = type(model.config).from_dict(said)
        with init_empty_weights(include_buffers=False):
            return type(model)._from_config(config).eval()
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ShapeError(
            f"{what}: transformers refuses a config with {shown(entries)}: {reason}"
        ) from error


def shown(entries: Mapping[str, Any]) -> str:
    """Return entries as they are written in a message."""
    return ", ".join(f"{name} = {value}" for name, value in entries.items())
