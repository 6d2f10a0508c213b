"""A tiny random Whisper with rows of sound."""

import wave
from pathlib import Path
from typing import Any

import numpy as np
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from tests.support.checkpoints import TEXT, tokenizer
from tests.support.vision import write_lines, write_random

BINS, FRAMES, RATE = 8, 200, 16000
"""Features of a frame, frames of a sample (2 s), samples a second."""
SPEECH = ("a fox", "the lazy dog jumps", "five dozen jugs", "my box")


def whisper_config(**entries: Any) -> WhisperConfig:
    """Return a tiny config."""
    sizes = {"num_mel_bins": BINS, "max_source_positions": FRAMES // 2, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    blocks = {"encoder_layers": 2, "decoder_layers": 2}
    neurons = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    tokens: dict[str, Any] = dict.fromkeys(("begin_suppress_tokens", "suppress_tokens"))
    tokens |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 96}
    tokens |= {"decoder_start_token_id": 1, "max_target_positions": 64}
    return WhisperConfig(**{**sizes, **heads, **blocks, **neurons, **tokens, **entries})


def write_speech(folder: Path, **entries: Any) -> Path:
    """Write the model, ``text.txt``, and ``rows.jsonl`` with .npy and .wav files."""
    write_random(WhisperForConditionalGeneration, whisper_config(**entries), folder)
    tokenizer().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=BINS, chunk_length=FRAMES // 100).save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    generator, rows = np.random.default_rng(0), []
    for number, text in enumerate(SPEECH):
        name = f"{number}.wav" if number % 2 else f"{number}.npy"
        if number % 2:
            write_wav(folder / name, generator.integers(-9000, 9000, 8000 * number))
        else:
            np.save(folder / name, generator.normal(size=(BINS, FRAMES)).astype(np.float32))
        rows.append({"audio": name, "text": text})
    write_lines(folder / "rows.jsonl", rows)
    return folder


def write_wav(file: Path, samples: Any, *, rate: int = RATE, width: int = 2) -> None:
    """Write samples as a .wav file of one channel."""
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        sound.writeframes(np.asarray(samples).astype(f"<i{width}").tobytes())
