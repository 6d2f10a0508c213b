"""The command ``prunekit bench``: measurements, files, error cases."""

import json
from dataclasses import replace

import pytest
import torch

import prunekit
from prunekit.cli.main import main
from prunekit.inference.benchmark import draw_plot, mean_speedups
from prunekit.inference.layer_speed import SpeedResults, SpeedRow
from tests.support import checkpoints
from tests.support.checkpoints import planned

ROW = SpeedRow(8, 8, 1, "2:4", 0.5, 2.0, 0.5, 0.1)


def test_speedups_are_averaged_geometrically_over_layers():
    rows = [
        replace(ROW, tokens=4, dense=3.0),
        ROW,
        replace(ROW, outputs=16, dense=0.5),
        replace(ROW, way="dense", dense=1.0),
    ]
    assert mean_speedups(rows) == {"2:4": {1: pytest.approx(1.0), 4: pytest.approx(3.0)}}
    assert list(mean_speedups(rows)["2:4"]) == [1, 4]


def test_the_plot_has_a_line_per_implementation():
    rows = [ROW, replace(ROW, way="bitmask"), replace(ROW, way="dense", dense=1.0)]
    plot = draw_plot(SpeedResults("H200", "bfloat16", 1.0, 1.0, rows))
    assert "<svg" in plot
    assert plot.count("<!-- 2:4 -->") == plot.count("<!-- bitmask -->") == 1
    assert "<!-- H200, bfloat16 -->" in plot


def test_the_command_measures_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")
    monkeypatch.setattr("prunekit.inference.layer_speed.MIN_SECONDS", 0.0)
    monkeypatch.setattr("prunekit.inference.benchmark.NEW_TOKENS", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoints.write(tmp_path / "m", dtype=torch.bfloat16)
    list(prunekit.run(planned(tmp_path / "m", tmp_path / "out", output={"format": "2:4"})))
    command = ["bench", "--model", str(tmp_path / "out"), "--output", str(tmp_path / "speed")]
    assert main([*command, "--tokens", "2", "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("2:4 ")
    assert said[-1].startswith("bitmask ")
    found = json.loads((tmp_path / "speed" / "speed.json").read_text())
    assert {(row["outputs"], row["inputs"]) for row in found["rows"]} == {
        (16, 32), (32, 32), (32, 64), (64, 32)
    }  # fmt: skip
    dense, sparse = found["models"]
    assert (dense["layers"], sparse["layers"], sparse["count"]) == ("dense", "2:4", 14)
    assert sparse["resident_bytes"] < dense["resident_bytes"]
    assert (tmp_path / "speed" / "speed.svg").read_text().count("2:4") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--dtype", "int8"], '--dtype "int8" is not a dtype'), (["--tokens", "0"], "at least 1")],
)
def test_what_cannot_be_measured_is_refused(options, message, tmp_path, capsys):
    assert main(["bench", "--output", str(tmp_path / "speed"), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_dense_model_is_refused(tmp_path, capsys):
    checkpoints.write(tmp_path / "m")
    assert main(["bench", "--model", str(tmp_path / "m")]) == 2
    assert "none of its layers has enough zeros" in capsys.readouterr().err
