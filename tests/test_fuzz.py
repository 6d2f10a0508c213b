"""Readers of files that others wrote: whatever is in one, they return or raise our own errors."""

import json
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from prunekit.checkpoint import INDEX, open_checkpoint, read_header
from prunekit.config import load_config
from prunekit.errors import CheckpointError, ConfigError
from tests import checkpoints

QUICK = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DEEP = "[" * 100_000
NUMBERS = st.integers() | st.floats() | st.sampled_from([-1, 2**31, 2**63, 2**64, 2**200])
NAMES = """
    dtype shape data_offsets __metadata__ weight_map metadata F32 BF16 quantization_config
    quant_method prunekit format linears 2:4 bitmask ../x.safetensors /etc/passwd
    model.safetensors a
"""
WORDS = st.sampled_from(NAMES.split())
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=12,
)
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8", 3, None]),
        "shape": st.lists(NUMBERS | st.integers(0, 4), max_size=4) | VALUES,
        "data_offsets": st.lists(NUMBERS | st.integers(0, 64), max_size=3) | VALUES,
    }
)
HEADERS = st.dictionaries(WORDS | st.text(max_size=3), TENSOR | VALUES, max_size=4)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("sound"), num_hidden_layers=1)


def written(folder: Path, header: bytes, length: int | None = None, data: bytes = b"\0" * 64):
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return file


def refused_or_read(read, *arguments):
    """Say that a reader answers or refuses."""
    try:
        return read(*arguments)
    except (CheckpointError, ConfigError):
        return None


@QUICK
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1) | st.none())
@example(b"{}", 2**63)
@example(DEEP.encode(), None)
@example(b'{"a": 1, "a": 2}', None)
@example(b"\xff\xfe{}", None)
def test_any_bytes_for_a_header(tmp_path, header, length):
    refused_or_read(read_header, written(tmp_path, header, length))


@QUICK
@given(HEADERS)
@example({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}})
@example({"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}})
@example({"a": {"dtype": "F32", "shape": [2**200], "data_offsets": [0, 4]}})
@example({"a": {"dtype": "F32", "shape": [True, 1.0], "data_offsets": [0, 4]}})
@example({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}})
def test_any_table_for_a_header(tmp_path, header):
    file = written(tmp_path, json.dumps(header).encode())
    for entry in (refused_or_read(read_header, file) or {}).values():
        assert 0 <= entry.nbytes <= 64
        assert all(type(size) is int and size >= 0 for size in entry.shape)


@QUICK
@given(VALUES | st.dictionaries(st.just("weight_map"), VALUES))
@example({"weight_map": {"a": "../model.safetensors"}})
@example({"weight_map": {"a": "\0"}})
@example({"weight_map": {"a": "x" * 5000}})
@example({"weight_map": {"a": "."}})
def test_any_index(sound, index):
    (sound / INDEX).write_text(json.dumps(index))
    found = refused_or_read(open_checkpoint, sound)
    (sound / INDEX).unlink()
    for entry in found.entries.values() if found else ():
        assert entry.file.parent == sound


@QUICK
@given(
    VALUES | st.dictionaries(st.sampled_from(["quantization_config", "sparsity_config"]), VALUES)
)
@example({"quantization_config": {"quant_method": "prunekit", "format": "2:4", "linears": 3}})
@example({"quantization_config": ["prunekit"]})
@example(
    {
        "quantization_config": {
            "quant_method": "prunekit",
            "format": "bitmask",
            "linears": {"a": [2**200, -1, 3, True]},
        }
    }
)
def test_any_config_of_a_model(sound, config):
    kept = (sound / "config.json").read_text()
    (sound / "config.json").write_text(json.dumps(config))
    refused_or_read(open_checkpoint, sound)
    (sound / "config.json").write_text(kept)


def test_a_config_of_a_model_that_nests_without_end(sound):
    kept = (sound / "config.json").read_text()
    (sound / "config.json").write_text(DEEP)
    with pytest.raises(CheckpointError, match=r"config\.json: is not JSON"):
        open_checkpoint(sound)
    (sound / "config.json").write_text(kept)


TOML = """\
[model]
path = "{model}"
[calibration]
data = "{model}/text.txt"
[prune]
method = "wanda"
pattern = "unstructured"
sparsity = 0.5
allocation = {{ name = "owl", spread = 0.08 }}
skip = ["lm_head"]
[output]
path = "out"
"""
PIECES = ["[prune]", "[", "]]", "=", '"', "'''", "{", "}", "\0", "\n", "\r", "nan", "inf", "-1"]
PIECES += [
    "1e999",
    "2020-01-01",
    "true",
    "[[model]]",
    "a.b.c = 1",
    "#",
    "é",
    "[" * 2000,
    "9" * 5000,
]


@QUICK
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 20), st.sampled_from(PIECES)), max_size=4)
)
def test_any_change_of_a_config(sound, tmp_path, edits):
    text = TOML.format(model=sound)
    for place, gone, piece in edits:
        at = int(place * len(text))
        text = text[:at] + piece + text[at + gone :]
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    refused_or_read(load_config, tmp_path / "config.toml")


@QUICK
@given(st.binary(max_size=100))
def test_any_bytes_for_a_config(tmp_path, content):
    (tmp_path / "config.toml").write_bytes(content)
    refused_or_read(load_config, tmp_path / "config.toml")
