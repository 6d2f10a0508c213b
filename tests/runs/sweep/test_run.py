"""Sweeps from config to comparison, resumed and extended."""

import csv
import json
import shutil
import statistics

import pytest

from prunekit.cli.main import main
from tests.support import checkpoints
from tests.support.sweeps import write_sweep


def test_a_sweep_is_carried_out_taken_up_and_shown(llama, tmp_path, in_process):
    sweep = 'tokens = 2\nkeep = false\nmethod = ["obs"]\nsparsity = [0.25, 0.5]'
    path = write_sweep(llama, tmp_path / "out", sweep)
    assert main(["run", str(path), "--quiet"]) == 0
    assert in_process == ["measure", *["_run_one", "measure"] * 2]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [run["sparsity"] for run in report["runs"]] == [0.25, 0.5]
    assert all(run["decode"] > 0 and run["texts"] for run in report["runs"])
    halved = report["runs"][1]
    assert halved["active"]["neurons"] == halved["whole"]["neurons"] // 2
    assert halved["parameters"] < report["model"]["parameters"]
    assert halved["evaluation"][0]["value"] != report["dense"]["evaluation"][0]["value"]
    own = json.loads((tmp_path / "out/runs/obs-0.5/report.json").read_text())
    assert own["evaluation"][0]["after"] == halved["evaluation"][0]["value"]
    assert not list((tmp_path / "out/runs").rglob("*.safetensors"))
    rows = list(csv.DictReader((tmp_path / "out/report.csv").read_text().splitlines()))
    assert [row["series"] for row in rows] == ["dense", *[run["series"] for run in report["runs"]]]
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<svg") == page.count("<figure") == 9
    assert "obs, 50.0 %: " in page
    in_process.clear()
    more = write_sweep(llama, tmp_path / "out", sweep.replace("0.5]", "0.5, 0.7]"))
    assert main(["run", str(more), "--quiet"]) == 2
    assert main(["run", str(more), "--quiet", "--resume"]) == 0
    assert in_process == ["_run_one", "measure"]
    assert main(["report", str(tmp_path / "out")]) == 0


def test_runs_on_several_gpus_give_the_report_of_one(
    llama, tmp_path, in_process, no_page, monkeypatch
):
    """Of GPUs that are counted alone: each task runs here, on the CPU."""
    sweep = 'tokens = 0\nkeep = false\nmethod = ["obs"]\nsparsity = [0.25, 0.5]'
    assert main(["run", str(write_sweep(llama, tmp_path / "one", sweep)), "--quiet"]) == 0
    spread = []

    def here(jobs, gpus):
        for name, tasks in jobs.items():
            spread.append((name, gpus, [function.__name__ for function, _ in tasks]))
            (*_, last) = [item for function, given in tasks for item in function(*given)]
            yield None  # as each second
            yield name, 0, last

    monkeypatch.setattr("prunekit.runs.sweep.run.run_side_by_side", here)
    monkeypatch.setattr("prunekit.runs.sweep.plan.usable_gpus", lambda device: 8)
    assert main(["run", str(write_sweep(llama, tmp_path / "two", sweep)), "--quiet"]) == 0
    assert spread == [(f"obs-{part}", 2, ["_run_one", "measure"]) for part in (0.25, 0.5)]
    one, two = (json.loads((tmp_path / f"{at}/report.json").read_text()) for at in ("one", "two"))
    for first, second in zip(one["runs"], two["runs"], strict=True):
        assert first["evaluation"] == second["evaluation"]
    assert not list((tmp_path / "two/runs").rglob("*.safetensors"))


@pytest.fixture
def begun(llama, tmp_path, in_process, no_page):
    """A copy of the model, and a sweep of it that stopped after the dense model and a run."""
    copy = shutil.copytree(llama, tmp_path / "model")
    path = write_sweep(copy, tmp_path / "out", 'tokens = 0\nmethod = ["obs"]\nsparsity = [0.25]')
    assert main(["run", str(path), "--quiet"]) == 0
    return copy, path


@pytest.mark.parametrize("changed", ["weights", "config.json", "text"])
def test_a_sweep_is_not_taken_up_with_another_input(begun, capsys, changed):
    copy, path = begun
    if changed == "weights":
        checkpoints.change(copy, "model.norm.weight", lambda weight: weight.mul_(2))
    elif changed == "text":
        (copy / "text.txt").write_text(checkpoints.TEXT.replace("o", "0"))
    else:
        checkpoints.configure(copy, rms_norm_eps=1e-3)
    assert main(["run", str(path), "--quiet", "--resume"]) == 2
    assert "was begun with another config, model" in capsys.readouterr().err


def test_overwriting_a_sweep_leaves_what_is_not_its_own(begun, tmp_path):
    _, path = begun
    (tmp_path / "out/notes.md").write_text("mine")
    (tmp_path / "out/other").mkdir()
    (tmp_path / "out/other/report.json").write_text("mine")
    path.write_text(path.read_text().replace("[0.25]", "[0.5]"))
    assert main(["run", str(path), "--quiet", "--overwrite"]) == 0
    assert [each.name for each in (tmp_path / "out/runs").iterdir()] == ["obs-0.5"]
    assert (tmp_path / "out/notes.md").read_text() == "mine"
    assert (tmp_path / "out/other/report.json").read_text() == "mine"


def test_seeds_are_shown_as_mean_and_deviation(llama, tmp_path, in_process, capsys):
    sweep = 'tokens = 0\nmethod = ["obs"]\nsparsity = [0.25, 0.5]\nseed = [0, 1, 2]'
    path = write_sweep(llama, tmp_path / "out", sweep)
    assert main(["run", str(path), "--quiet"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {run["series"] for run in report["runs"]} == {"obs"}
    assert [run["calibration"]["seed"] for run in report["runs"]] == [0, 1, 2] * 2
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "out"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    values = [run["evaluation"][0]["value"] for run in report["runs"]]
    assert [row["measures"][0]["values"] for row in rows[1:]] == [values[:3], values[3:]]
    assert rows[1]["measures"][0]["deviation"] == statistics.stdev(values[:3]) > 0
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("obs, 50.0 %: ") < 3 * page.count("obs, 25.0 %: ")
    assert " ± " in page
    assert r"\begin{tabular}" in page
    apart = [str(tmp_path / f"out/runs/obs-0.5-seed{seed}") for seed in range(3)]
    assert main(["compare", *apart, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["rows"]
    assert again[1]["measures"][0]["values"] == values[3:]
