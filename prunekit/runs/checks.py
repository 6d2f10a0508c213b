"""TODO-DOC prunekit/runs/checks.py (out of prunekit/planning.py)."""

import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from prunekit.checkpoint.output import nearest_folder
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.errors import CapacityError, ConfigError
from prunekit.evaluation.generation import AT_ONCE
from prunekit.formatting import size
from prunekit.models.layout import is_causal_language_model
from prunekit.models.sequential.block_runner import StackRunner


def check_judged(
    config: Config | StructuredConfig, model: PreTrainedModel, stacks: list[StackRunner]
) -> None:
    """Refuse to measure the perplexity of what has none.

    Raises:
        ConfigError: It is asked for, and the model is not a causal language model.
    """
    if config.evaluate and not is_causal_language_model(model, stacks):
        raise ConfigError(
            f"{config.model.path}: {type(model).__name__} has no perplexity, which is for causal "
            "language models. Leave out [evaluate]."
        )


def check_writes(
    config: Config | StructuredConfig, model: PreTrainedModel, stacks: list[StackRunner]
) -> None:
    """Refuse to calibrate on what a model writes that writes nothing.

    Raises:
        ConfigError: So it is.
    """
    own = config.calibration and config.calibration.own
    writes = is_causal_language_model(model, stacks) and model.config.architectures
    if own and not writes:
        raise ConfigError(
            f'calibration.data: {type(model).__name__} does not write text, as "self" asks. Name '
            "texts."
        )


def writer_memory(
    config: Config | StructuredConfig,
    model: PreTrainedModel,
    stacks: list[StackRunner],
    length: int,
    dtype: torch.dtype,
) -> int:
    """Return the bytes that the whole model takes to write its calibration text; 0 if it does not.

    The cache is counted as if all heads had keys of their own.
    """
    if not (config.calibration and config.calibration.own):
        return 0
    blocks = sum(len(runner.blocks) for runner in stacks)
    width = max(runner.features for runner in stacks)
    cache = 2 * min(AT_ONCE, config.calibration.samples) * length * blocks * width
    return (sum(value.numel() for value in model.parameters()) + cache) * dtype.itemsize


def capped(config: Config | StructuredConfig, limit: int) -> tuple[tuple[int, int], list[str]]:
    """Return the tokens of a calibration sample and of an evaluation window, and what to say."""
    asked = {
        "calibration.length": config.calibration.length if config.calibration else 1,
        "evaluate.length": config.evaluate.length if config.evaluate else 1,
    }
    notes = [
        f"{key} shortened from {length} to {limit} tokens, the most this model takes."
        for key, length in asked.items()
        if length > limit
    ]
    calibration, evaluation = (min(length, limit) for length in asked.values())
    return (calibration, evaluation), notes


def check_disk(path: str, needed: int) -> None:
    """Refuse an output folder that cannot be written.

    Raises:
        ConfigError: It is a file, or would be below one.
        CapacityError: It is not ours to write to, or too little is free.
    """
    existing = nearest_folder(Path(path))
    if not os.access(existing, os.W_OK):
        raise CapacityError(f"output.path: {existing} cannot be written to.")
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CapacityError(
            f"output.path: {existing} has {size(free)} free, the checkpoint needs {size(needed)}."
        )
