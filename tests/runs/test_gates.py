"""Gates: what was reached, beside what was asked for."""

import json
import math
from pathlib import Path

import pytest

import prunekit
from prunekit.cli.main import main
from prunekit.config.gates_table import Gates
from prunekit.config.load import load_config
from prunekit.errors import GateError
from prunekit.reports import report as reports
from prunekit.runs.gates import check_gates, failures
from prunekit.runs.stage import Stage
from prunekit.runs.status import read_status
from tests.support import checkpoints
from tests.support.structured import BASE, EVALUATE

STORIES = Path("/work/shared/models/stories260K")


def evaluation(metric, before, after, data="a"):
    return {"data": data, "metric": metric, "before": before, "after": after}


def layer(name, error):
    return {"name": name, "relative_error": error}


ZEROS = {"zeros": 69, "of": 100, "target": 0.7, "achieved": 0.69}
REPORT = {
    "evaluation": [
        evaluation("perplexity", 10.0, 12.0),
        evaluation("perplexity", 10.0, 13.0, "b"),
        evaluation("accuracy", 0.9, 0.87),
        evaluation("loss", 0.1, 9.0),
    ],
    "sparsity": ZEROS,
    "layers": [layer("x", 0.1), layer("y", 0.4), layer("z", None)],
}


def gate(report, **limits):
    (found,) = check_gates(Gates(**limits), REPORT | report)
    return found


def test_the_worst_of_a_kind_counts():
    found = gate({}, perplexity_increase=0.25)
    assert found["achieved"] == pytest.approx(0.3)
    assert (found["met"], found["where"]) == (False, "b (10.00 → 13.00)")
    assert gate({}, perplexity_increase=0.31)["met"]
    assert gate({}, accuracy_drop=0.029)["achieved"] == pytest.approx(0.03)
    assert not gate({}, accuracy_drop=0.029)["met"]
    assert gate({}, layer_error=0.4) == {
        "name": "layer_error", "asked": 0.4, "achieved": 0.4, "met": True, "where": "y",
    }  # fmt: skip


def test_sparsity_is_compared_with_what_was_asked_for_either_way():
    found = gate({}, sparsity_gap=1e-3)
    assert found["achieved"] == pytest.approx(0.01)
    assert found["where"] == "69 zeros of 100 weights, 0.7 asked for"
    assert not found["met"]
    units = {"target": 0.5, "removed": {"heads": [4, 8], "neurons": [4, 10]}}
    found = gate({"sparsity": units}, sparsity_gap=0.05)
    assert found["achieved"] == pytest.approx(0.1)
    assert found["where"] == "4 of 10 neurons"
    budget = {"target": None, "budget": 0.7, "parameters": [100, 69], "removed": {}}
    assert gate({"sparsity": budget}, sparsity_gap=0.02)["met"]


def test_what_is_no_number_is_worse_than_any():
    report = {"evaluation": [evaluation("perplexity", 10.0, "nan"), REPORT["evaluation"][0]]}
    found = gate(report, perplexity_increase=100.0)
    assert math.isnan(found["achieved"])
    assert not found["met"]
    infinite = {"evaluation": [evaluation("perplexity", 10.0, "inf")]}
    assert not gate(infinite, perplexity_increase=100.0)["met"]
    assert not gate({"layers": []}, layer_error=9.0)["met"]


def test_without_limits_nothing_is_checked():
    assert check_gates(None, {}) == []
    assert failures({}) == ""
    assert failures({"gates": [gate({}, layer_error=0.5)]}) == ""


PRUNE = {
    "weights": 'method = "wanda"\npattern = "2:4"',
    "trained": 'method = "wanda"\npattern = "2:4"',
    "units": 'method = "obs"\npattern = "neurons"\nsparsity = 0.45',
    "gradual units": 'method = "gradient"\npattern = "heads"\nsparsity = 0.6\nend = 2\nevery = 1',
}
MISSED = {"weights": "layer_error", "trained": "layer_error"}
"""The limit that a run of a kind misses at 0; runs over units miss their sparsity, rounded."""
TRAIN = "[train]\nsteps = 2\nheld_out = 2\nevery = 1\n"


@pytest.fixture
def config(tmp_path):
    model = checkpoints.write(tmp_path / "m")

    def config(kind, gates):
        text = BASE + EVALUATE + (TRAIN if kind in {"trained", "gradual units"} else "")
        given = {"model": model, "text": model, "output": tmp_path / "out"}
        path = tmp_path / "config.toml"
        path.write_text(text.format(**given, prune=PRUNE[kind]) + f"[gates]\n{gates}\n")
        return path

    return config


@pytest.mark.usefixtures("no_page", "proof_in_process")
@pytest.mark.parametrize("kind", PRUNE)
def test_a_run_of_any_kind_fails_by_its_limits_and_keeps_its_work(config, tmp_path, capsys, kind):
    missed = MISSED.get(kind, "sparsity_gap")
    path = config(kind, f"perplexity_increase = 99.0\n{missed} = 0.0")
    assert main(["run", str(path)]) == 1
    said = capsys.readouterr().err
    assert f"gates.{missed}: " in said
    assert "NOT MET" in said
    assert f"The checkpoint and its report are in {tmp_path / 'out'}." in said
    status = read_status(tmp_path / "out")
    assert status.stage is Stage.FAILED
    assert f"gates.{missed}" in (status.error or "")
    first, second = reports.load(tmp_path / "out")["gates"]
    assert (second["name"], second["asked"], second["met"]) == (missed, 0.0, False)
    assert first["met"]
    assert (tmp_path / "out/config.json").is_file()


@pytest.mark.usefixtures("proof_in_process")
def test_limits_may_only_be_reported(config, tmp_path):
    path = config("weights", 'layer_error = 0.0\nsparsity_gap = 0.01\non_fail = "keep"')
    *_, finish = prunekit.run(prunekit.plan(load_config(path)))
    met = {each["name"]: each["met"] for each in finish.values["gates"]}
    assert met == {"layer_error": False, "sparsity_gap": True}
    assert read_status(tmp_path / "out").stage is Stage.COMPLETE
    assert "<h2>Gates</h2>" in (tmp_path / "out/report.html").read_text()


@pytest.mark.usefixtures("no_page", "proof_in_process")
def test_in_python_a_failure_is_an_error_after_the_last_record(config):
    plan = prunekit.plan(load_config(config("weights", "layer_error = 0.0")))
    for resume in (False, True):
        kinds = []
        with pytest.raises(GateError, match=r"gates\.layer_error: .* in model\.layers"):
            kinds.extend(each.kind for each in prunekit.run(plan, resume=resume))
        assert kinds[-1] == "finish"


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not there")
@pytest.mark.usefixtures("no_page", "proof_in_process")
def test_wanda_at_70_percent_of_stories_misses_its_sparsity(tmp_path):
    """Each row has a whole number of zeros, rounded down: 68.997 %."""
    text = Path("/work/shared/data/tinystories/train.txt")
    text = text if text.is_file() else next(Path("/work/shared/data").rglob("*.txt"))
    path = tmp_path / "config.toml"
    path.write_text(
        f'[model]\npath = "{STORIES}"\ndevice = "cpu"\n'
        f'[calibration]\ndata = "{text}"\nsamples = 2\nlength = 64\n'
        '[prune]\nmethod = "wanda"\npattern = "unstructured"\nsparsity = 0.7\n'
        '[gates]\nsparsity_gap = 1e-3\n[output]\npath = "out"\n'
    )
    assert main(["run", str(path), "--quiet"]) == 1
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["sparsity"]["achieved"] == pytest.approx(0.68997, abs=1e-5)
    assert report["gates"][0]["met"] is False
