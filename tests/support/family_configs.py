"""Tiny configs of every model type of the installed transformers, shrunk from its defaults."""

import re
from collections.abc import Iterator
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.support.family_sizes import OVERRIDES, SIZES

TASKS: dict[str, Any] = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING,
    "vlm": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "masked": MODEL_FOR_MASKED_LM_MAPPING,
    "speech": MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
}
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer")
MOST_BLOCKS = 4
IMAGE_TOKEN, OTHER_TOKEN = 90, 91
"""Tokens that stand for images, and that no text has."""
_DROPPED = {
    "transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "return_dict",
    "id2label", "label2id", "base_model_tp_plan", "rope_scaling",
}  # fmt: skip


def cases() -> Iterator[str]:
    """Yield ``task:model_type`` of each class for language, alone, with images or of speech.

    Speech that is read as text with sound is tried as seq2seq.
    """
    text = {*TASKS["seq2seq"]._model_mapping}
    for task, mapping in TASKS.items():
        types = [each for each in mapping._model_mapping if task != "speech" or each not in text]
        yield from (f"{task}:{model_type}" for model_type in types)


def model_class(task: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of a task for a config."""
    found = TASKS[task][type(config)]
    return found[0] if isinstance(found, tuple) else found


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a config with few, small blocks of each kind that the default has."""
    kind = CONFIG_MAPPING[model_type]
    small = _shrunk(kind().to_dict(), model_type)
    small.pop("model_type", None)
    _merge(small, OVERRIDES.get(model_type, {}))
    return kind(**small)


def _merge(values: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _shrunk(values: dict[str, Any], model_type: str) -> dict[str, Any]:
    depth = next((values[key] for key in DEPTHS if isinstance(values.get(key), int)), 0)
    blocks = _one_of_each_kind(values, depth)
    found = {
        key: _entry(key, value, model_type, depth, blocks)
        for key, value in values.items()
        if key not in _DROPPED
    }
    if "qk_rope_head_dim" in found:
        found |= {"head_dim": 4} if found.get("head_dim") is not None else {}
        found |= {"num_key_value_heads": 4} if "num_key_value_heads" in found else {}
    return {key: value for key, value in found.items() if key != "per_layer_config" or value}


def _entry(key: str, value: Any, model_type: str, depth: int, blocks: list[int]) -> Any:
    """Return the small value of one config entry.

    Args:
        key: Name of the entry.
        value: Its default.
        model_type: Model type of the config around it.
        depth: Number of blocks of the default.
        blocks: Numbers of the blocks of the default that are kept; empty if they are alike.
    """
    if key == "per_layer_config":
        old = {int(number): entries for number, entries in (value or {}).items()}
        return {
            new: {name: _layer_size(name, size) for name, size in old[number].items()}
            for new, number in enumerate(blocks or (0, 1))
            if number in old
        }
    if key == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
        partial = {"partial_rotary_factor": 1.0} if "partial_rotary_factor" in value else {}
        return {**value, "mrope_section": [2, 1, 1], **partial}
    if isinstance(value, dict) and (key.endswith("config") or "model_type" in value):
        return _shrunk(value, value.get("model_type", model_type))
    if key.endswith(("token_id", "token_index")) and value is not None:
        value = _token(key, value)
    elif isinstance(value, list | tuple) and depth > 2 and len(value) == depth:
        value = [value[number] for number in blocks or (0, 1)]
    elif key in SIZES and isinstance(value, int | float) and not isinstance(value, bool):
        value = len(blocks) if blocks and key in DEPTHS else SIZES[key]
    return value


def _layer_size(name: str, size: Any) -> Any:
    return 16 if name == "head_dim" else SIZES.get(name, size)


def _token(key: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [2]
    if key.endswith("token_index"):
        return OTHER_TOKEN
    if re.search("image|video|audio|vision", key):
        return IMAGE_TOKEN
    return min(value, 3) if value >= 0 else value


def _one_of_each_kind(values: dict[str, Any], depth: int) -> list[int]:
    """Return the first block of each kind that lists of the config name."""
    named = [
        value
        for value in values.values()
        if isinstance(value, list | tuple)
        and len(value) == depth > 2
        and all(isinstance(entry, str) for entry in value)
    ]
    if not named:
        return []
    first: dict[tuple[str, ...], int] = {}
    for number, kinds in enumerate(zip(*named, strict=True)):
        first.setdefault(kinds, number)
    found = sorted(first.values())[:MOST_BLOCKS]
    return found if len(found) > 1 else [0, 1]
