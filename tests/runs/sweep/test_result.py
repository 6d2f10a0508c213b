"""The report of a sweep."""

import json

import pytest
import torch

from prunekit.cli.main import main
from prunekit.config.load import load_config
from prunekit.structured.agreement import spearman
from tests.support.sweeps import BASE, write_sweep


def test_a_sweep_of_rankers_says_how_far_they_agree(llama, tmp_path, in_process):
    """Spearman's ρ between methods and to leave-one-out, as numbers and figure."""
    sweep = 'tokens = 0\nmethod = ["magnitude", "leave-one-out", "random"]\nsparsity = [0.5]'
    text = BASE.replace('"neurons"', '"heads"')
    path = write_sweep(llama, tmp_path / "out", sweep, text=text)
    names = [*load_config(path).runs]
    assert main(["run", str(path), "--quiet"]) == 0
    (found,) = json.loads((tmp_path / "out/report.json").read_text())["agreement"]
    assert found["rankers"] == ["magnitude", "leave-one-out", "random"]
    matrix = torch.tensor(found["spearman"])
    assert torch.equal(matrix, matrix.T)
    scores = [
        {layer["name"]: torch.tensor(layer["scores"]) for layer in own["layers"]}
        for name in names[:2]
        for own in [json.loads((tmp_path / f"out/runs/{name}/report.json").read_text())]
    ]
    assert found["spearman"][0][:2] == [1.0, pytest.approx(spearman(*scores))]
    page = (tmp_path / "out/report.html").read_text()
    assert "How far rankers of heads agree" in page
    assert "magnitude → leave-one-out: " in page
