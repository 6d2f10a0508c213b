"""Rows of sound with text, for encoders that read log-mel features.

A ``.jsonl`` or ``.jsonl.gz`` file whose first row has the key ``audio`` holds them: a path
relative to the file, and beside it ``text``, which the decoder reads. The path is one of a ``.npy``
file with features [F, L], or of a ``.wav`` file, of which the feature extractor of the model makes
them.

Shapes: F features of a frame, L frames, T tokens.
"""

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from prunekit.data.row_samples import SHOWN, RowSamples, first_row_has, named_file, sample_rows
from prunekit.data.rows import json_rows, valid_text
from prunekit.errors import ConfigError, is_out_of_memory

AUDIO = "audio"
ENDINGS = (".npy", ".wav")
ROW = 'a row needs "audio", the path of a .npy or .wav file, and "text"'


class SoundRow(NamedTuple):
    """A row as read: file and line, sound, text."""

    where: str
    file: Path
    text: str


def has_sounds(source: str) -> bool:
    """Return whether a source is a file of sound with text."""
    return first_row_has(source, AUDIO)


def sound_rows(sources: Sequence[str]) -> list[SoundRow]:
    """Read the rows of files of sound with text.

    Raises:
        ConfigError: A file cannot be read, a row is none of these, or a sound is missing.
    """
    return [_row(source, *each) for source in sources for each in json_rows(source)]


def _row(source: str, where: str, row: Any) -> SoundRow:  # noqa: ANN401  as parsed
    name, text = (row.get(AUDIO), row.get("text")) if isinstance(row, dict) else (None, None)
    if not (isinstance(name, str) and isinstance(text, str)):
        raise ConfigError(f"{where}: {ROW}")
    if not name.endswith(ENDINGS):
        raise ConfigError(f"{where}: {name[-SHOWN:]!r} is neither a .npy nor a .wav file")
    return SoundRow(where, named_file(source, name, where), valid_text(text, where))


class SoundReader:
    """Makes inputs of rows.

    Args:
        tokenizer: Tokenizer of the model.
        extractor: Its feature extractor, or None if it has none.
        shape: Features of a frame, and frames of a sample.
        limit: Number of token ids that the model knows.
        length: Most tokens of a text.
    """

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401  transformers has no common class
        extractor: Any,  # noqa: ANN401
        shape: tuple[int, int],
        limit: int,
        length: int,
    ) -> None:
        self._tokenizer, self._extractor, self._shape = tokenizer, extractor, shape
        self._limit, self._length = limit, length

    def sample(self, sources: Sequence[str], count: int, seed: int) -> RowSamples:
        """Return the inputs of rows chosen at random, at most ``count``.

        Raises:
            ConfigError: A file or a row is invalid, or all texts are longer.
        """
        return sample_rows(sound_rows(sources), self.inputs, sources, count, self._length, seed)

    def inputs(self, row: SoundRow) -> dict[str, Tensor]:
        """Return the inputs of a row.

        Raises:
            ConfigError: The sound cannot be read or has another shape, or the model lacks a token.
        """
        ids = torch.tensor([self._tokenizer(row.text, verbose=False)["input_ids"]])
        if not ids.numel():
            raise ConfigError(f"{row.where}: the tokenizer makes no token of the text")
        if (largest := int(ids.max())) >= self._limit:
            raise ConfigError(
                f"{row.where}: the tokenizer makes token {largest}, but the model has embeddings "
                f"for {self._limit}, 0 to {self._limit - 1}"
            )
        features = self._of_sound(row) if row.file.suffix == ".wav" else _of_array(row)
        if tuple(features.shape) != self._shape or not features.isfinite().all():
            raise ConfigError(
                f"{row.where}: {row.file.name} has features {[*features.shape]}, the model reads "
                f"{[*self._shape]} finite numbers"
            )
        return {"input_features": features[None], "input_ids": ids, "decoder_input_ids": ids}

    def _of_sound(self, row: SoundRow) -> Tensor:
        """Return the features of a .wav file."""
        if self._extractor is None:
            raise ConfigError(
                f"{row.where}: the model has no feature extractor (preprocessor_config.json), "
                "which makes features of a .wav file; give .npy files of features"
            )
        samples, rate = _read_wav(row)
        if rate != self._extractor.sampling_rate:
            raise ConfigError(
                f"{row.where}: {row.file.name} has {rate} samples a second, the model reads "
                f"{self._extractor.sampling_rate}"
            )
        try:
            made = self._extractor(samples, sampling_rate=rate, return_tensors="pt")
        except Exception as error:  # extractors raise anything
            if is_out_of_memory(error):
                raise
            raise ConfigError(f"{row.where}: {row.file.name}: {error}") from error
        return made["input_features"][0]


def _read_wav(row: SoundRow) -> tuple[np.ndarray, int]:
    """Return samples of a .wav file in -1..1, and their rate.

    Of several channels it is the mean.
    """
    try:
        with wave.open(str(row.file), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames, content = file.getnframes(), file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{row.where}: {row.file.name} cannot be read: {error}") from error
    if len(content) != frames * channels * width:
        raise ConfigError(
            f"{row.where}: {row.file.name} is cut off: its header says {frames:,} frames, "
            f"{len(content) // (channels * width):,} are there. Save it again"
        )
    if width != 2 or not content:
        raise ConfigError(
            f"{row.where}: {row.file.name} has {8 * width} bits a sample; give 16-bit sound"
        )
    samples = np.frombuffer(content, "<i2").reshape(-1, channels).mean(axis=1)
    return (samples / 32768).astype(np.float32), rate


def _of_array(row: SoundRow) -> Tensor:
    """Return the features of a .npy file."""
    try:
        with row.file.open("rb") as stream:
            values = np.load(stream, allow_pickle=False)
    except (ValueError, EOFError, OSError, BadZipFile) as error:
        raise ConfigError(f"{row.where}: {row.file.name} cannot be read: {error}") from error
    if not (isinstance(values, np.ndarray) and values.dtype.kind == "f"):
        raise ConfigError(f"{row.where}: {row.file.name} holds no floating-point numbers")
    return torch.from_numpy(values.astype(np.float32))
