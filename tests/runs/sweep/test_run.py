"""Sweeps from config to comparison, resumed and extended."""

import csv
import json

from prunekit.cli.main import main
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
