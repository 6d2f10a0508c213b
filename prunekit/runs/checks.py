"""Checks and limits that planners of every kind of run share."""

import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit.checkpoint.output_path import check_apart, nearest_existing_folder
from prunekit.checkpoint.reader import Checkpoint
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.errors import CapacityError, ConfigError
from prunekit.evaluation.generation import SAMPLES_AT_ONCE
from prunekit.formatting import size
from prunekit.models.layout import is_causal_language_model
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.vocabulary import load_tokenizer


def text_tokenizer(
    config: Config | StructuredConfig, checkpoint: Checkpoint | None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run.

    It is None, against its type, for a run that reads no text.

    Args:
        config: The user's config.
        checkpoint: The model; None for a plan that is only shown.

    Raises:
        ConfigError: The run reads text, and there is no tokenizer that can be loaded.
    """
    reads_text = config.calibration is not None or config.evaluate is not None
    return load_tokenizer(checkpoint) if checkpoint and reads_text else cast("Any", None)


def check_generates_text(
    config: Config | StructuredConfig, model: PreTrainedModel, stacks: list[StackRunner]
) -> None:
    """Refuse calibration on text of a model that generates none.

    Args:
        config: The user's config.
        model: The model, with or without weights.
        stacks: Runners of its block stacks.

    Raises:
        ConfigError: ``calibration.data`` is "self", and the model is no causal language model.
    """
    self_generated = config.calibration and config.calibration.self_generated
    generates = is_causal_language_model(model, stacks) and model.config.architectures
    if self_generated and not generates:
        raise ConfigError(
            f'calibration.data: {type(model).__name__} does not write text, as "self" asks. Name '
            "texts."
        )


def generation_memory(
    config: Config | StructuredConfig,
    model: PreTrainedModel,
    stacks: list[StackRunner],
    length: int,
    dtype: torch.dtype,
) -> int:
    """Return the bytes needed to generate calibration text; 0 for none.

    Args:
        config: The user's config.
        model: The whole model, which generates.
        stacks: Runners of its block stacks.
        length: Tokens of a calibration sample.
        dtype: Dtype in which the model generates.

    The cache is counted as if every attention head had its own keys and values.
    """
    if not (config.calibration and config.calibration.self_generated):
        return 0
    blocks = sum(len(runner.blocks) for runner in stacks)
    width = max(runner.features for runner in stacks)
    cache = 2 * min(SAMPLES_AT_ONCE, config.calibration.samples) * length * blocks * width
    return (sum(value.numel() for value in model.parameters()) + cache) * dtype.itemsize


def cap_lengths(config: Config | StructuredConfig, limit: int) -> tuple[tuple[int, int], list[str]]:
    """Return tokens of a calibration sample and evaluation window, capped, with notes."""
    requested = {
        "calibration.length": config.calibration.length if config.calibration else 1,
        "evaluate.length": config.evaluate.length if config.evaluate else 1,
    }
    rows = {
        f"{name}.length"
        for name, table in (("calibration", config.calibration), ("evaluate", config.evaluate))
        if table and table.task and "length" not in table.model_fields_set
    }
    notes = [
        f"{key} shortened from {length} to {limit} tokens, the most this model takes."
        for key, length in requested.items()
        if length > limit and key not in rows  # each has its own length, below the default one
    ]
    calibration, evaluation = (min(length, limit) for length in requested.values())
    return (calibration, evaluation), notes


def check_output_path(config: Config | StructuredConfig, checkpoint: Checkpoint) -> None:
    """Refuse an output folder that is invalid or overlaps the input.

    Args:
        config: The user's config.
        checkpoint: The model.

    Raises:
        ConfigError: The folder cannot be created, holds the model or a text, or is in the model.
    """
    output = Path(config.output.path)
    nearest_existing_folder(output)
    texts = [config.calibration, config.evaluate]
    sources = [Path(source) for each in texts if each for source in each.data]
    files = {entry.file for entry in checkpoint.file_entries.values()}
    paths = [checkpoint.folder, *files, *checkpoint.companions]
    check_apart(output, [*paths, *(path for path in sources if path.is_absolute())])


def check_disk(path: str, needed: int, joining: int, least: int, states: int = 0) -> None:
    """Refuse an output folder that cannot hold the checkpoint.

    Args:
        path: The folder.
        needed: Bytes of the checkpoint.
        joining: Bytes beside it while its shards are joined.
        least: The same with the smallest ``max_shard_size``.
        states: Bytes of saved states of a training beside it, which are gone by then.

    Raises:
        ConfigError: The path is a file, or is inside one.
        CapacityError: The folder is not writable, or has fewer bytes free.
    """
    existing = nearest_existing_folder(Path(path))
    if not os.access(existing, os.W_OK):
        raise CapacityError(f"output.path: {existing} cannot be written to.")
    usage = shutil.disk_usage(existing)
    # Some file systems of object stores do not know their size, and report 0.
    if usage.total and needed + max(joining, states) > usage.free:
        more = (
            f"the state of the training {size(states)} more; save_every = 0 saves none"
            if states > joining
            else f"{size(joining)} more while its files are written"
            + f"; a smaller output.max_shard_size needs {size(least)}" * (least < joining)
        )
        raise CapacityError(
            f"output.path: {existing} has {size(usage.free)} free, the checkpoint needs "
            f"{size(needed)}, {more}."
        )
