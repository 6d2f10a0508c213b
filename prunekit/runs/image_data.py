"""Images with text as calibration data, read at plan time."""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from prunekit.architectures import Architecture, find_architecture
from prunekit.architectures.towers import probe_towers
from prunekit.checkpoint.reader import Checkpoint
from prunekit.config.prune_table import Prune
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.data.images import ImageReader, has_images, image_rows
from prunekit.data.row_samples import RowSamples
from prunekit.data.sources import title
from prunekit.distributed.ranks import Ranks
from prunekit.errors import ConfigError
from prunekit.models.processors import load_processor
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.entry import IMAGES, is_image
from prunekit.models.stock import config_parts
from prunekit.models.vocabulary import token_limit


def image_sources(config: Config | StructuredConfig) -> list[str]:
    """Return the entries of ``calibration.data`` that hold images.

    Raises:
        ConfigError: A file cannot be read.
    """
    return config.calibration.rows_of(has_images) if config.calibration else []


def architecture_of_part(
    config: Config, checkpoint: Checkpoint, model: PreTrainedModel
) -> Architecture:
    """Return the architecture of the part of a model that is pruned.

    Towers are found with the inputs that the processor makes of a grey image.

    Args:
        config: The user's config.
        checkpoint: The model.
        model: The same on the meta device.

    Raises:
        PrunekitError: There is no such part, or no processor.
    """
    architecture, part = find_architecture(model), config.model.part
    if part == "language":
        return architecture
    if IMAGES.isdisjoint(inspect.signature(type(model).forward).parameters):
        raise ConfigError(f'model.part: "{part}", but {type(model).__name__} reads no images.')
    modules = [model.base_model.get_submodule(stack.module) for stack in architecture.stacks]
    reader = ImageReader(load_processor(checkpoint), token_limit(model, modules), sys.maxsize)
    towers = probe_towers(model, architecture, reader.example())
    stacks = towers if part == "vision" else (*towers, *architecture.stacks)
    return replace(architecture, stacks=stacks, probed=True)


def check_part(config: Config | StructuredConfig, stacks: Sequence[StackRunner]) -> None:
    """Refuse runs that do not prune towers.

    Args:
        config: The user's config.
        stacks: Runners of the block stacks that are pruned.

    Raises:
        ConfigError: The run removes units or trains, permutes the residual stream, or calibrates
            towers on text.
    """
    part, prune = config.model.part, config.prune
    if part == "language":
        return
    if isinstance(config, StructuredConfig) or config.training:
        raise ConfigError(
            f'model.part: "{part}" is for zeros in weights, without [train]. Leave it out.'
        )
    assert isinstance(prune, Prune)
    if prune.permute:
        raise ConfigError(f'prune.permute: is for the text, not for model.part = "{part}".')
    if len([runner for runner in stacks if not runner.stack.tower]) > 1:
        raise ConfigError('model.part: "all" is for decoders. Choose "vision" or "language".')
    if config.calibration and not image_sources(config):
        raise ConfigError(
            f'calibration.data: model.part = "{part}" is calibrated on images: name .jsonl files '
            'whose rows have the key "image", or choose a method that needs no calibration and '
            "leave [calibration] out."
        )


def check_images(
    config: Config | StructuredConfig, model: PreTrainedModel, stacks: Sequence[StackRunner]
) -> None:
    """Refuse images that do not fit model, run or other data.

    Args:
        config: The user's config.
        model: The model, with or without weights.
        stacks: Runners of its block stacks.

    Raises:
        ConfigError: The model reads no images, or encodes them in blocks that it prunes, the run
            needs text, a file is invalid, or an image
            is missing.
    """
    found = image_sources(config)
    if not found:
        return
    assert config.calibration is not None
    names = ", ".join(map(title, found))
    if IMAGES.isdisjoint(inspect.signature(type(model).forward).parameters):
        raise ConfigError(
            f"calibration.data: {names} has images, which {type(model).__name__} does not read. "
            'Take the key "image" out of its rows to calibrate on their text.'
        )
    text = [runner for runner in stacks if not runner.stack.tower]
    if len(text) > 1 or any(runner.stack.carries for runner in text):
        raise ConfigError(
            f"calibration.data: {names} has images, on which decoders are pruned whose blocks hand "
            f"on hidden states alone; {type(model).__name__} is none. Calibrate on text."
        )
    if isinstance(config, StructuredConfig) or config.training:
        what = "units are removed" if isinstance(config, StructuredConfig) else "a model is trained"
        raise ConfigError(
            f"calibration.data: {names} has images, on which weights are pruned, without [train]; "
            f"{what} on text."
        )
    if len(found) < len(config.calibration.data):
        others = ", ".join(title(each) for each in config.calibration.data if each not in found)
        raise ConfigError(
            f"calibration.data: {names} has images with text, {others} text alone. Put the text "
            'into rows with "image": null.'
        )
    image_rows(found)


def image_samples(
    config: Config, checkpoint: Checkpoint, limit: int, length: int, ranks: Ranks
) -> RowSamples | None:
    """Return calibration samples of images with text, None for other data.

    Args:
        config: The user's config.
        checkpoint: The model.
        limit: Number of token ids that it knows.
        length: Most tokens of a sample.
        ranks: Processes that share the samples.

    Raises:
        ConfigError: There is no processor, it fails on a row, or a process has no image for a tower
            that is pruned.
    """
    if not (found := image_sources(config)):
        return None
    assert config.calibration is not None
    reader = ImageReader(load_processor(checkpoint), limit, length)
    samples = reader.sample(found, config.calibration.samples, config.calibration.seed)
    own = samples.even_batches(1, ranks.shard(len(samples)))
    if config.model.part != "language" and not any(map(is_image, own)):
        raise ConfigError(
            "calibration.samples: none of those of a process has an image, on which the vision "
            "tower is calibrated. Raise it, or start fewer processes."
        )
    return samples


def tower_tokens(model: PreTrainedModel, stacks: Sequence[StackRunner], images: RowSamples) -> int:
    """Return an upper bound of a row's patches; 0 without towers.

    A tower reads each patch as a token.

    Args:
        model: The model.
        stacks: Runners of the block stacks that are pruned.
        images: The samples.
    """
    if not any(runner.stack.tower for runner in stacks):
        return 0
    parts = config_parts(model.config)
    sizes = (getattr(part, "patch_size", None) for part in parts)
    patch = min((size for size in sizes if isinstance(size, int)), default=8)
    entries = max(row[name].numel() for row in images.rows for name in IMAGES & row.keys())
    return entries // (3 * patch * patch)
