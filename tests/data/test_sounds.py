"""Sound with text: rows, features, and what is refused."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from prunekit.data.sounds import SoundReader, has_sounds, sound_rows
from prunekit.errors import ConfigError
from tests.support.checkpoints import tokenizer
from tests.support.speech import BINS, FRAMES, RATE, write_speech, write_wav
from tests.support.vision import write_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_speech(tmp_path_factory.mktemp("speech"))


def extractor():
    return WhisperFeatureExtractor(feature_size=BINS, chunk_length=FRAMES // 100)


def reader(made=None, limit=96, length=64):
    return SoundReader(tokenizer(), made or extractor(), (BINS, FRAMES), limit, length)


def inputs_of(folder, row, **options):
    file = write_lines(folder / "one.jsonl", [row])
    return reader(**options).inputs(sound_rows([str(file)])[0])


def test_features_are_those_of_the_file_and_of_the_extractor(folder):
    found = inputs_of(folder, {"audio": "0.npy", "text": "a fox"})
    assert torch.equal(found["input_features"][0], torch.from_numpy(np.load(folder / "0.npy")))
    samples = np.sin(np.arange(RATE) / 9) * 20000
    write_wav(folder / "sine.wav", samples)
    found = inputs_of(folder, {"audio": "sine.wav", "text": "a fox"})
    rounded = (samples.astype(np.int16) / 32768).astype(np.float32)
    expected = extractor()(rounded, sampling_rate=RATE, return_tensors="pt")["input_features"]
    torch.testing.assert_close(found["input_features"], expected)
    assert found["decoder_input_ids"].tolist() == [tokenizer()("a fox")["input_ids"]]


def test_the_first_row_says_whether_a_file_has_sound(folder):
    assert has_sounds(str(folder / "rows.jsonl"))
    assert not has_sounds(str(write_lines(folder / "text.jsonl", [{"text": "a"}])))
    assert not has_sounds("pydoc:train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"audio": "0.npy"}, 'a row needs "audio"'),
        ({"audio": 3, "text": "a"}, 'a row needs "audio"'),
        ([], 'a row needs "audio"'),
        ({"audio": "0.mp3", "text": "a"}, "neither a .npy nor a .wav file"),
        ({"audio": "9.npy", "text": "a"}, "no such file"),
        ({"audio": "9.wav", "text": ""}, "no such file"),
        ({"audio": f"data:{'x' * 5000}.wav", "text": "a"}, "x…': no such file"),
        ({"audio": "a\0b.wav", "text": "a"}, "no such file"),
        ({"audio": "\ud800.wav", "text": "a"}, "no such file"),
        ({"audio": "zip.npy", "text": "a"}, "cannot be read"),
        ({"audio": "cut.wav", "text": "a"}, "cut off: its header says 9 frames, 7 are there"),
        ({"audio": "odd.wav", "text": "a"}, "cut off: its header says 9 frames, 8 are there"),
        ({"audio": "0.npy", "text": ""}, "makes no token"),
        ({"audio": "short.npy", "text": "a"}, "has features [8, 3], the model reads [8, 200]"),
        ({"audio": "nan.npy", "text": "a"}, "finite numbers"),
        ({"audio": "whole.npy", "text": "a"}, "holds no floating-point numbers"),
        ({"audio": "object.npy", "text": "a"}, "cannot be read"),
        ({"audio": "text.wav", "text": "a"}, "cannot be read"),
        ({"audio": "slow.wav", "text": "a"}, "has 8000 samples a second, the model reads 16000"),
        ({"audio": "wide.wav", "text": "a"}, "has 32 bits a sample; give 16-bit sound"),
        ({"audio": "empty.wav", "text": "a"}, "give 16-bit sound"),
    ],
)
def test_a_row_that_cannot_be_read_is_refused_with_its_place(folder, row, message):
    np.save(folder / "short.npy", np.zeros((BINS, 3), np.float32))
    np.save(folder / "nan.npy", np.full((BINS, FRAMES), np.nan, np.float32))
    np.save(folder / "whole.npy", np.zeros((BINS, FRAMES), np.int64))
    np.save(folder / "object.npy", np.array([{}], dtype=object))
    (folder / "text.wav").write_text("no sound")
    (folder / "zip.npy").write_bytes(b"PK\3\4")
    for name, cut in (("cut", 4), ("odd", 1)):
        write_wav(folder / f"{name}.wav", range(9))
        (folder / f"{name}.wav").write_bytes((folder / f"{name}.wav").read_bytes()[:-cut])
    write_wav(folder / "slow.wav", [1, 2, 3], rate=8000)
    write_wav(folder / "wide.wav", [1, 2, 3], width=4)
    write_wav(folder / "empty.wav", [])
    with pytest.raises(ConfigError) as error:
        inputs_of(folder, row)
    assert message in str(error.value)
    assert "one.jsonl:1" in str(error.value)


def test_a_wav_file_needs_the_extractor(folder):
    row = sound_rows([str(folder / "rows.jsonl")])[1]
    with pytest.raises(ConfigError, match="the model has no feature extractor"):
        SoundReader(tokenizer(), None, (BINS, FRAMES), 96, 64).inputs(row)


def test_tokens_that_the_model_lacks_are_refused(folder):
    with pytest.raises(ConfigError, match="but the model has embeddings for 5, 0 to 4"):
        inputs_of(folder, {"audio": "0.npy", "text": "a fox"}, limit=5)


def test_longer_texts_are_left_out(folder):
    found = reader(length=8).sample([str(folder / "rows.jsonl")], 9, seed=0)
    assert len(found) < 4
    assert "longer than 8 tokens left out" in found.description
