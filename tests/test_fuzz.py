"""Fuzz tests of the readers of untrusted files.

The checks are those of ``tests.support.readers`` and must hold for any content.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from prunekit.checkpoint.formats import formats
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import CheckpointError
from prunekit.models.empty_model import empty_model
from prunekit.structured import gate_file
from tests.conftest import ROOT
from tests.support import mutations, payloads, readers

QUICK = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
RUNS = 300
"""Changed files for each reader; the soak tier has 100 000."""
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
def places(tmp_path_factory):
    """The parent folder of one folder per reader."""
    folder = tmp_path_factory.mktemp("fuzz") / "readers"
    readers.lay_out(folder)
    readers.warm(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in readers.READERS if name != "model"])
def test_changed_files(places, name):
    chance = mutations.Chance(name)
    pool = [file.read_bytes() for file in sorted((places / name / "seeds").iterdir())]
    for _ in range(RUNS):
        content = mutations.CHANGES[name](chance.choice(pool), chance)
        read(places, name, content)
        if chance.random() < 0.1:
            pool.append(content)


@pytest.mark.parametrize(("name", "kind"), [("two_four", "2:4"), ("bitmask", "bitmask")])
def test_changed_files_show_that_a_check_is_absent(places, name, kind, monkeypatch):
    monkeypatch.setattr(formats()[kind], "find_contradiction", lambda *_: None)
    with pytest.raises((AssertionError, RuntimeError)):
        test_changed_files(places, name)


def test_changed_gates_show_that_a_check_is_absent(places, monkeypatch):
    monkeypatch.setattr(gate_file, "check_finite", lambda *_: None)
    with pytest.raises(AssertionError):
        test_changed_files(places, "gates")


def guided(places, names, *options):
    """Return guided fuzzing's log per reader."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is absent: it has wheels for Linux on x86-64 alone")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, str(ROOT / "tests/support/guided.py"), str(places), *names, *options]
    fixed = {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=os.environ | fixed, check=False, capture_output=True)
    return {name: (places / name / "log").read_text() for name in names}


def assert_no_failure(said):
    assert "Uncaught" not in said, said[said.index("Uncaught") :]
    assert said.rstrip().endswith("second(s)"), said


@pytest.mark.soak
def test_what_coverage_leads_to_in_some_minutes(places):
    for said in guided(places, [*readers.READERS], "-max_total_time=60").values():
        assert_no_failure(said)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_coverage_leads_to_no_payload_that_opens_to_another_weight(places):
    for said in guided(places, [*payloads.READERS], "-runs=100000", "-seed=1").values():
        assert_no_failure(said)


def read(places, name, content):
    readers.READERS[name](places / name / "files", content)


@QUICK
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1) | st.none())
@example(b"{}", 2**63)
@example(DEEP.encode(), None)
@example(b'{"a": 1, "a": 2}', None)
@example(b"\xff\xfe{}", None)
def test_any_bytes_for_a_header(places, table, length):
    read(places, "header", readers.framed(table, length))


@QUICK
@given(HEADERS)
@example({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}})
@example({"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}})
@example({"a": {"dtype": "F32", "shape": [2**200], "data_offsets": [0, 4]}})
@example({"a": {"dtype": "F32", "shape": [True, 1.0], "data_offsets": [0, 4]}})
@example({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}})
def test_any_table_for_a_header(places, table):
    read(places, "header", readers.framed(json.dumps(table).encode()))


@QUICK
@given(VALUES | st.dictionaries(st.just("weight_map"), VALUES))
@example({"weight_map": {"a": "../model.safetensors"}})
@example({"weight_map": {"a": "\0"}})
@example({"weight_map": {"a": "x" * 5000}})
@example({"weight_map": {"a": "."}})
def test_any_index(places, index):
    read(places, "index", json.dumps(index).encode())


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
def test_any_config_of_a_model(places, config):
    read(places, "model_config", json.dumps(config).encode())


MISTAKEN = [
    {"hidden_size": "32"},
    {"hidden_act": "x"},
    {"num_attention_heads": 0},
    {"num_key_value_heads": -1},
    {"vocab_size": 0},
    {"pad_token_id": 96},
    {"id2label": []},
    {"dtype": "x"},
    {"rope_scaling": 3},
    {"architectures": 1},
    {"architectures": [3]},
    {"architectures": ["AutoConfig"]},
    {"architectures": ["logging"]},
    {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"},
    {"num_labels": 2**40},
    {"num_hidden_layers": 2**40},
    {"head_dim": 2**40},
    {"intermediate_size": 2**200},
    {"model_type": "t5", "num_decoder_layers": 2**40},
    {"model_type": "mixtral", "num_local_experts": 2**40},
]


@pytest.mark.parametrize("changes", MISTAKEN, ids=str)
def test_what_no_model_can_be_built_from_is_refused(places, tmp_path, changes):
    for file in (places / "model/files").glob("*.safetensors*"):
        (tmp_path / file.name).symlink_to(file)
    said = json.loads((places / "model/seeds/0").read_text())
    if "model_type" in changes:
        said = {}
    (tmp_path / "config.json").write_text(json.dumps(said | changes))
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        empty_model(open_checkpoint(tmp_path))


@pytest.mark.parametrize("sizes", [["8", 16, 64], [8, 16], [8, -16, 64], [8, 16.0, 64], [[], 1, 1]])
def test_sizes_of_a_compressed_weight_that_are_none(places, tmp_path, sizes):
    said = {"quant_method": "prunekit", "format": "2:4", "linears": {"2:4": sizes}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    with pytest.raises(CheckpointError, match="quantization_config is not one that this version"):
        open_checkpoint(tmp_path)


def test_a_config_of_a_model_that_nests_without_end(tmp_path):
    (tmp_path / "config.json").write_text(DEEP)
    with pytest.raises(CheckpointError, match=r"config\.json: is not JSON"):
        open_checkpoint(tmp_path)


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
def test_any_change_of_a_config(places, edits):
    text = TOML.format(model=places / "llama")
    for place, gone, piece in edits:
        at = int(place * len(text))
        text = text[:at] + piece + text[at + gone :]
    read(places, "config", text.encode())


@QUICK
@given(st.binary(max_size=100))
def test_any_bytes_for_a_config(places, content):
    read(places, "config", content)
