"""Commands that show names, runs and their status."""

import json

import pytest

from prunekit.cli.main import main
from prunekit.runs.status import STATUS


def test_one_name_is_listed_with_its_settings(capsys):
    assert main(["list", "wanda"]) == 0
    shown = capsys.readouterr().out
    assert "wanda" in shown
    assert "sparsegpt" not in shown
    assert main(["list", "format"]) == 0
    assert "bitmask" in capsys.readouterr().out


def test_programs_get_the_list_as_json(capsys):
    assert main(["list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    (found,) = [each for each in entries if each["name"] == "sparsegpt"]
    assert found["kind"] == "method"
    assert found["settings"]["damping"]["default"] == 0.01
    assert {each["kind"] for each in entries} >= {"pattern", "allocation", "schedule", "format"}


def test_a_name_that_nothing_has_is_refused(capsys):
    assert main(["list", "wander"]) == 2
    assert 'nothing is called "wander". Did you mean "wanda"?' in capsys.readouterr().err


def test_the_status_of_a_run_is_told(tmp_path, capsys):
    values = {
        "stage": "failed", "task": "prune", "done": 3, "steps": 4, "seconds": 75.0,
        "error": "layer 3 is NaN",
    }  # fmt: skip
    (tmp_path / STATUS).write_text(json.dumps(values))
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Failed", "  3 of 4 steps, 75.0 %", "  after 1 min 15 s", "  layer 3 is NaN",
    ]  # fmt: skip
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == values | {"title": "Failed", "progress": 0.75}


def test_a_folder_without_a_run_has_no_status(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.fixture
def runs(tmp_path):
    """Folders of two runs that differ in their seed."""
    from tests.conftest import ROOT

    report = json.loads((ROOT / "tests/support/example_report.json").read_text())
    for seed, after in enumerate((20.0, 22.0)):
        report["evaluation"][0]["after"] = after
        (tmp_path / f"{seed}").mkdir()
        (tmp_path / f"{seed}/report.json").write_text(json.dumps(report))
    return [str(tmp_path / "0"), str(tmp_path / "1")]


def test_runs_are_compared_in_three_ways(runs, capsys):
    assert main(["compare", *runs]) == 0
    assert "| 21.00 ± 1.41 |" in capsys.readouterr().out
    assert main(["compare", *runs, "--latex"]) == 0
    assert r"21.00 $\pm$ 1.41 &" in capsys.readouterr().out
    assert main(["compare", *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][-1]["measures"][0]["values"] == [20.0, 22.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "name the output folders"), (["a", "--latex", "--json"], "exclude each other")],
)
def test_what_cannot_be_compared_is_refused(arguments, message, capsys):
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err
