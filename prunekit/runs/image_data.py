"""Images with text as calibration data: checked and read while a run is planned."""

import inspect
from collections.abc import Sequence

from transformers import PreTrainedModel

from prunekit.checkpoint.reader import Checkpoint
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.data.images import ImageReader, ImageSamples, has_images, image_rows
from prunekit.data.sources import title
from prunekit.errors import ConfigError
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.vocabulary import load_processor

PIXELS = frozenset({"pixel_values", "image_patches"})
"""Inputs of models that read images."""


def image_sources(config: Config | StructuredConfig) -> list[str]:
    """Return the entries of ``calibration.data`` that hold images.

    Raises:
        ConfigError: A file cannot be read.
    """
    calibration = config.calibration
    if calibration is None or calibration.task or calibration.self_generated:
        return []
    return [source for source in calibration.data if has_images(source)]


def check_images(
    config: Config | StructuredConfig, model: PreTrainedModel, stacks: Sequence[StackRunner]
) -> None:
    """Refuse images that do not fit the model, the run, or the other data.

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
    if PIXELS.isdisjoint(inspect.signature(type(model).forward).parameters):
        raise ConfigError(
            f"calibration.data: {names} has images, which {type(model).__name__} does not read. "
            'Take the key "image" out of its rows to calibrate on their text.'
        )
    if len(stacks) > 1 or any(runner.stack.carries for runner in stacks):
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
    config: Config, checkpoint: Checkpoint, limit: int, length: int
) -> ImageSamples | None:
    """Return the calibration samples of images with text, or None for other data.

    Args:
        config: The user's config.
        checkpoint: The model.
        limit: Number of token ids that it knows.
        length: Most tokens of a sample.

    Raises:
        ConfigError: There is no processor, or it fails on a row.
    """
    if not (found := image_sources(config)):
        return None
    assert config.calibration is not None
    reader = ImageReader(load_processor(checkpoint), limit, length)
    return reader.sample(found, config.calibration.samples, config.calibration.seed)
