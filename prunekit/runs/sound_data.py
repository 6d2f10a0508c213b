"""Sound with text as calibration data, read at plan time."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from prunekit.architectures.features import FRAMES, feature_shape
from prunekit.checkpoint.reader import Checkpoint
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.data.row_samples import RowSamples
from prunekit.data.sounds import SoundReader, has_sounds, sound_rows
from prunekit.data.sources import title
from prunekit.errors import ConfigError
from prunekit.models.processors import load_extractor
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.vocabulary import load_tokenizer


def sound_sources(config: Config | StructuredConfig) -> list[str]:
    """Return the entries of ``calibration.data`` that hold sound.

    Raises:
        ConfigError: A file cannot be read.
    """
    return config.calibration.rows_of(has_sounds) if config.calibration else []


def check_sounds(
    config: Config | StructuredConfig, model: PreTrainedModel, stacks: Sequence[StackRunner]
) -> None:
    """Refuse sound that does not fit model, run or other data.

    Args:
        config: The user's config.
        model: The model, with or without weights.
        stacks: Runners of its block stacks.

    Raises:
        ConfigError: The model encodes no sound, the run needs text, a file is invalid, or a sound
            is missing.
    """
    found, reads = sound_sources(config), any(runner.stack.features for runner in stacks)
    of_text = isinstance(config, StructuredConfig) and config.calibration
    if reads and (of_text or config.training):
        raise ConfigError(
            f"{config.model.path}: {type(model).__name__} encodes sound; of such models weights "
            "are pruned, and units by rankers that need no [calibration], without [train]."
        )
    if not found:
        return
    assert config.calibration is not None
    names = ", ".join(map(title, found))
    if not reads:
        raise ConfigError(
            f"calibration.data: {names} has sound, of which {type(model).__name__} reads no "
            'log-mel features. Take the key "audio" out of its rows to calibrate on their text.'
        )
    if len(found) < len(config.calibration.data):
        raise ConfigError(
            f"calibration.data: {names} has sound with text, other entries text alone. Name one "
            "kind."
        )
    sound_rows(found)


def sound_samples(
    config: Config, checkpoint: Checkpoint, stacks: Sequence[StackRunner], limit: int, length: int
) -> RowSamples | None:
    """Return calibration samples of sound with text, None for other data.

    Args:
        config: The user's config.
        checkpoint: The model.
        stacks: Runners of its block stacks.
        limit: Number of token ids that it knows.
        length: Most tokens of a sample.

    Raises:
        ConfigError: A sound cannot be read or does not fit the model.
    """
    if not (found := sound_sources(config)):
        return None
    assert config.calibration is not None
    shape = feature_shape(stacks[0].module)
    tokenizer, extractor = load_tokenizer(checkpoint), load_extractor(checkpoint)
    reader = SoundReader(tokenizer, extractor, shape, limit, length)
    return reader.sample(found, config.calibration.samples, config.calibration.seed)


def random_feature_notes(
    config: Config, stacks: Sequence[StackRunner], samples: RowSamples | None
) -> list[str]:
    """Return a note where a sound encoder is calibrated on random features.

    Args:
        config: The user's config.
        stacks: Runners of the block stacks.
        samples: Samples of sound, if there are any.
    """
    if config.calibration is None or samples or not any(each.stack.features for each in stacks):
        return []
    return [
        "The encoder is calibrated on random features, for want of sound: name .jsonl files whose "
        'rows have the key "audio".'
    ]


def encoded_tokens(stacks: Sequence[StackRunner]) -> int:
    """Return the tokens that a sound encoder makes; 0 without one."""
    counts = (getattr(each.module.config, FRAMES) for each in stacks if each.stack.features)
    return max(counts, default=0)
