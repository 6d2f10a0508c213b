"""Read and validate ``config.json`` with transformers.

The file may be wrong or malicious: sizes are compared with the weight files before anything of that
size is allocated, and code that ships with a checkpoint is never run.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from prunekit.checkpoint.compressed import KEPT_UNITS_KEY
from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import CheckpointError, PrunekitError, is_out_of_memory
from prunekit.models import stock

T = TypeVar("T")
SIZE_KEYS = (
    "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads",
    "head_dim",
)  # fmt: skip
"""Config attributes that cannot exceed the longest dimension of any tensor."""
COUNT_KEYS = (
    "num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
    "num_experts", "num_local_experts", "n_routed_experts",
)  # fmt: skip
"""Config attributes that cannot exceed the number of tensors."""
LEAST = dict.fromkeys((*SIZE_KEYS, *COUNT_KEYS), 0)
LEAST |= {"num_hidden_layers": 1, "max_position_embeddings": 1, "sliding_window": 0}
"""Smallest integer that a config attribute can have."""
UNCHECKED_SIZE, UNCHECKED_COUNT = 1_000_000, 1000
"""Sizes (and label counts) and counts that are cheap enough to accept without such a check."""


def read_hf_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """Return the config as transformers reads it, without the storage format.

    Raises:
        CheckpointError: transformers does not support the model without custom code, or sizes in
            the config contradict the weight files.
    """
    labels = checkpoint.config.get("num_labels")
    if isinstance(labels, int) and labels > UNCHECKED_SIZE:
        where = checkpoint.folder / "config.json"
        raise CheckpointError(f"{where}: num_labels is {labels}, more than any model has.")
    failed = "cannot read it"
    if "auto_map" in checkpoint.config:
        kind = checkpoint.config.get("model_type")
        failed = f"has no model type {kind!r}. Code that comes with a checkpoint is never run"
    config = call_transformers(checkpoint, failed, lambda: stock.read_config(checkpoint.folder))
    _check_values(config, checkpoint)
    _check_sizes(config, checkpoint)
    config.return_dict = True
    # Checkpoint.read decompresses weights, so models are built dense.
    vars(config).pop("quantization_config", None)
    return config


def config_and_class(
    checkpoint: Checkpoint,
) -> tuple[PretrainedConfig, type[PreTrainedModel] | None]:
    """Return the config, without a cache, and the model class.

    The class is None if the config names no architecture: only the base model is known then.

    Raises:
        CheckpointError: The config cannot be used (see :func:`read_hf_config`), or transformers has
            no such class.
    """
    config = read_hf_config(checkpoint)
    config.use_cache = False
    return config, model_class(checkpoint, config)


def model_class(checkpoint: Checkpoint, config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the model class that a config names, or None.

    Raises:
        CheckpointError: transformers has no such class.
    """
    try:
        return stock.named_class(config)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: {error}.") from error


def call_transformers(checkpoint: Checkpoint, failed: str, work: Callable[[], T]) -> T:
    """Return the result of a transformers call, with uniform errors.

    Args:
        checkpoint: Its ``config.json`` is named in the error.
        failed: Part of the error message, such as "cannot read it".
        work: The call.

    Raises:
        CheckpointError: The call raised any exception other than a PrunekitError or a lack of
            memory.
    """
    try:
        return work()
    except PrunekitError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        where = checkpoint.folder / "config.json"
        raise CheckpointError(
            f"{where}: transformers {transformers.__version__} {failed}: {stock.describe(error)}"
        ) from error


def _check_values(config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """Refuse values that transformers takes and that fail late."""
    where = checkpoint.folder / "config.json"
    kept = checkpoint.config.get(KEPT_UNITS_KEY)
    if not (kept is None or isinstance(kept, dict)):
        raise CheckpointError(f"{where}: {KEPT_UNITS_KEY} is not a table of numbers of units.")
    dtype = config.dtype
    if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise CheckpointError(f"{where}: dtype is {dtype!r}, which is no floating-point type.")
    for part in stock.config_parts(config):
        for name, least in LEAST.items():
            value = stock.config_value(part, name)
            per_layer = value if isinstance(value, list | tuple) else [value]
            if any(_is_wrong(each, least) for each in per_layer):
                raise CheckpointError(
                    f"{where}: {name} is {value!r}; it is a number from {least} on."
                )


def _is_wrong(value: Any, least: float) -> bool:  # noqa: ANN401
    fraction = isinstance(value, float) and not value.is_integer()
    return isinstance(value, str) or fraction or (value is not None and value < least)


def _check_sizes(config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    shapes = [entry.shape for entry in checkpoint.entries.values()]
    longest = max((side for shape in shapes for side in shape), default=0)
    for part in stock.config_parts(config):
        for names, most in (
            (SIZE_KEYS, max(longest, UNCHECKED_SIZE)),
            (COUNT_KEYS, max(len(shapes), UNCHECKED_COUNT)),
        ):
            for name in names:
                value = stock.config_value(part, name)
                # Doge's configs name experts, by default, also where the model has none.
                usual = value == getattr(type(part), name, None)
                if isinstance(value, int) and value > most and not usual:
                    raise CheckpointError(
                        f"{checkpoint.folder / 'config.json'}: {name} is {value}, more than the "
                        "files can have. It belongs to another model."
                    )
