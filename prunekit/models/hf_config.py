"""The model that ``config.json`` describes, as transformers understands it.

Whoever wrote the file may have made mistakes or meant harm: sizes are held against the files before
anything of that size is made, and no code that came with a checkpoint is run.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import CheckpointError, PrunekitError

T = TypeVar("T")
SIZES = (
    "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads",
    "head_dim",
)  # fmt: skip
"""What cannot exceed the longest side of a tensor, by the names that all configs answer to."""
COUNTS = (
    "num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
    "num_experts", "num_local_experts", "n_routed_experts",
)  # fmt: skip
"""What has a tensor of its own, at least."""
LARGE, MANY = 1_000_000, 1000
"""Sizes, labels too, and counts that are built without asking the files: they cost little."""


def described(checkpoint: Checkpoint) -> tuple[PretrainedConfig, type[PreTrainedModel] | None]:
    """Return the config of a model and its class, None where only the base model is known.

    Raises:
        CheckpointError: transformers does not know the model, or only by code that came with it, or
            what is said of it does not go with the files.
    """
    where = checkpoint.folder / "config.json"
    labels = checkpoint.config.get("num_labels")
    if isinstance(labels, int) and labels > LARGE:
        raise CheckpointError(f"{where}: num_labels is {labels}, more than any model has.")
    kind = checkpoint.config.get("model_type")
    failed = "cannot read it"
    if "auto_map" in checkpoint.config:
        failed = f"has no model type {kind!r}. Code that comes with a checkpoint is never run"
    config = understood(
        checkpoint,
        failed,
        lambda: AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False),
    )
    _check_sizes(config, checkpoint)
    config.use_cache = False
    # What is stored compressed, the checkpoint gives dense.
    vars(config).pop("quantization_config", None)
    names = config.architectures or []
    if not names:
        return config, None
    name = names[0] if isinstance(names, list) else names
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(f"{where}: transformers {transformers.__version__} has no {name!r}.")
    return config, found


def understood(checkpoint: Checkpoint, failed: str, work: Callable[[], T]) -> T:
    """Return what transformers makes of ``config.json``.

    Raises:
        CheckpointError: It makes nothing of it, in whichever of its ways.
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
        for names, most in ((SIZES, max(longest, LARGE)), (COUNTS, max(len(shapes), MANY))):
            for name in names:
                value = getattr(part, name, None)
                if isinstance(value, int) and value > most:
                    raise CheckpointError(
                        f"{checkpoint.folder / 'config.json'}: {name} is {value}, more than the "
                        "files can have. It belongs to another model."
                    )


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield a config and those of the parts of a model that it is made of."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)
