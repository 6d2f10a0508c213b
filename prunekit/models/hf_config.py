"""Read and validate ``config.json`` with transformers.

The file may be wrong or malicious: sizes are compared with the weight files before anything of that
size is allocated, and code that ships with a checkpoint is never run.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import CheckpointError, PrunekitError

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
UNCHECKED_SIZE, UNCHECKED_COUNT = 1_000_000, 1000
"""Sizes (and label counts) and counts that are cheap enough to accept without such a check."""


def config_and_class(
    checkpoint: Checkpoint,
) -> tuple[PretrainedConfig, type[PreTrainedModel] | None]:
    """Return the config and the model class.

    The class is None if the config names no architecture: only the base model is known then.

    Raises:
        CheckpointError: transformers does not support the model without custom code, or sizes in
            the config contradict the weight files.
    """
    where = checkpoint.folder / "config.json"
    labels = checkpoint.config.get("num_labels")
    if isinstance(labels, int) and labels > UNCHECKED_SIZE:
        raise CheckpointError(f"{where}: num_labels is {labels}, more than any model has.")
    kind = checkpoint.config.get("model_type")
    failed = "cannot read it"
    if "auto_map" in checkpoint.config:
        failed = f"has no model type {kind!r}. Code that comes with a checkpoint is never run"
    config = call_transformers(
        checkpoint,
        failed,
        lambda: AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False),
    )
    _check_sizes(config, checkpoint)
    config.use_cache = False
    # Checkpoint.read decompresses weights, so the model is built dense.
    vars(config).pop("quantization_config", None)
    names = config.architectures or []
    if not names:
        return config, None
    name = names[0] if isinstance(names, list) else names
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise CheckpointError(f"{where}: transformers {transformers.__version__} has no {name!r}.")
    return config, model_class


def call_transformers(checkpoint: Checkpoint, failed: str, work: Callable[[], T]) -> T:
    """Return the result of a transformers call, with uniform errors.

    Args:
        checkpoint: Its ``config.json`` is named in the error.
        failed: Part of the error message, such as "cannot read it".
        work: The call.

    Raises:
        CheckpointError: The call raised any exception other than a PrunekitError.
    """
    try:
        return work()
    except PrunekitError:
        raise
    except Exception as error:
        where = checkpoint.folder / "config.json"
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise CheckpointError(
            f"{where}: transformers {transformers.__version__} {failed}: {reason}"
        ) from error


def _check_sizes(config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    shapes = [entry.shape for entry in checkpoint.entries.values()]
    longest = max((side for shape in shapes for side in shape), default=0)
    for part in _parts(config):
        for names, most in (
            (SIZE_KEYS, max(longest, UNCHECKED_SIZE)),
            (COUNT_KEYS, max(len(shapes), UNCHECKED_COUNT)),
        ):
            for name in names:
                value = getattr(part, name, None)
                if isinstance(value, int) and value > most:
                    raise CheckpointError(
                        f"{checkpoint.folder / 'config.json'}: {name} is {value}, more than the "
                        "files can have. It belongs to another model."
                    )


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield a config and all configs nested in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)
