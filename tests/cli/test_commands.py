"""Commands other than ``run`` and ``plan``: their output and exit codes."""

import json
import resource
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from prunekit.cli.main import main
from tests.conftest import ROOT


def test_inspect_prints_every_tensor_in_full(replace, capsys):
    name = "model.layers.0." + "x" * 80
    facts = {"shape": [4, 8], "dtype": "float32", "sparsity": 0.5, "n_of_m": "2:4"}
    found = [{"name": name, **facts, "format": "bitmask"}]
    replace({"evaluation.inspect": {"inspect": lambda path: found}})
    assert main(["inspect", "m"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == (
        [name, "4x8", "float32", "50.0", "%", "2:4", "bitmask"]
    )


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_verify_exits_with_1_when_a_check_fails(replace, passed, code, capsys):
    checks = [
        SimpleNamespace(name="files", passed=True, detail="sound"),
        SimpleNamespace(name="zeros", passed=passed, detail="7 zeros"),
    ]
    replace({"evaluation.verify": {"verify": lambda path: checks}})
    assert main(["verify", "m"]) == code
    word = "passed" if passed else "FAILED"
    assert capsys.readouterr().out == f"passed  files: sound\n{word}  zeros: 7 zeros\n"


def test_programs_get_checks_and_tensors_as_json(replace, capsys):
    checks = [SimpleNamespace(name="files", passed=False, detail="cut off")]
    replace({"evaluation.verify": {"verify": lambda path: checks}})
    assert main(["verify", "m", "--json"]) == 1
    (check,) = [{"name": "files", "passed": False, "detail": "cut off"}]
    assert json.loads(capsys.readouterr().out) == {"passed": False, "checks": [check]}
    replace({"evaluation.inspect": {"inspect": lambda path: [{"name": "a", "sparsity": 0.5}]}})
    assert main(["inspect", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": "a", "sparsity": 0.5}]


def test_report_writes_the_page_again(tmp_path, capsys):
    example = (ROOT / "tests/support/example_report.json").read_text()
    (tmp_path / "report.json").write_text(example)
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"


def test_report_of_no_run_exits_with_2(tmp_path):
    assert main(["report", str(tmp_path)]) == 2


def test_schema_prints_json(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Config"


def test_init_writes_a_config_and_never_overwrites_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    text = Path("config.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text)["prune"]["method"] == "admm"
    assert text.startswith("#:schema ./prunekit.schema.json\n")
    assert json.loads(Path("prunekit.schema.json").read_text())["title"] == "Config"
    Path("config.toml").write_text("mine")
    assert main(["init"]) == 2
    assert Path("config.toml").read_text() == "mine"
    assert main(["init", "no/such/folder.toml"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_demo_shows_its_runs_side_by_side(replace, capsys):
    module = {"demo": lambda folder: [folder], "table": lambda reports: f"{reports}"}
    replace({"cli.demo": module})
    assert main(["demo", "here"]) == 0
    assert "here" in capsys.readouterr().out


def test_init_leaves_no_beginning_of_a_config(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert main(["init", str(tmp_path / "c.toml")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "c.toml: cannot be written: File too large." in capsys.readouterr().err
    assert not (tmp_path / "c.toml").exists()


def test_bench_refuses_an_output_before_it_measures(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["bench", "--output", str(tmp_path / "file"), "--device", "cpu"]) == 2
    assert "--output: " in capsys.readouterr().err
