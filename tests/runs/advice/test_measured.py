"""Remarks where another choice was measured to be better, and that they are what was measured."""

import json
import statistics

import pytest

from prunekit.config.run_config import Config
from prunekit.runs import jobs
from prunekit.runs.advice import measured as advice
from prunekit.runs.advice.base import Subject
from prunekit.runs.advice.rules import remarks
from tests.conftest import ROOT
from tests.support import checkpoints

RESULTS = ROOT / "bench/results"


def config(train=None, **prune):
    """Return a config; ``train`` is a number of steps."""
    values = {
        "model": {"path": "model"},
        "calibration": {"data": "pydoc:train"},
        "prune": {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.7} | prune,
        "output": {"path": "out"},
    }
    if prune.get("sparsity", 0) is None:  # the pattern has one
        del values["prune"]["sparsity"]
    return Config.model_validate(values | ({"train": {"steps": train}} if train else {}))


def said_of(given):
    return remarks(Subject(given))


def test_a_method_that_measured_worse_is_remarked_with_figures_and_source():
    assert said_of(config()) == (
        "prune.method: at 70% sparsity stories15M had a perplexity of 687 by magnitude, 15.8 by "
        "admm (dense 4.43; bench/results/quality/quality.md).",
    )
    assert "at 60% sparsity stories15M had a perplexity of 26.2 by wanda" in str(
        said_of(config(method="wanda", sparsity=0.55))
    )
    (said,) = said_of(config(200, sparsity=0.95, end=100))
    assert "at 90% sparsity and 200 steps gpt2-tinystories had a perplexity of 51.9" in said
    assert "by magnitude on a schedule, 25.9 by admm before the training, without" in said
    (said,) = said_of(config(200, sparsity=0.8))
    assert "25.9 by magnitude before the training, 15.7 by admm" in said


def test_a_schedule_that_ends_early_is_remarked():
    (said,) = said_of(config(100, method="admm", end=20))
    assert said == (
        "prune.end: step 20 of 100 is early. At 80% sparsity and 200 steps gpt2-tinystories had a "
        "perplexity of 25.6 with the end at 10%, 23.1 with the end at 50%, 22.4 with the end at "
        "80% of the steps (bench/results/training/ends.json)."
    )
    assert len(said_of(config(100, end=20))) == 2


@pytest.mark.parametrize(
    "given",
    [
        config(sparsity=0.5),
        config(pattern="2:4", sparsity=None),
        config(method="admm"),
        config(method="sparsegpt"),
        config(200, method="wanda"),
        config(advice.FEW_STEPS, end=100),
        config(100, method="admm", end=30),
        config(100, method="admm", end=10, schedule="one-shot"),
    ],
    ids=[
        "half",
        "2:4",
        "admm",
        "not measured",
        "not measured, trained",
        "many steps",
        "late",
        "one shot",
    ],
)
def test_nothing_is_remarked_without_a_figure(given):
    assert said_of(given) == ()


def test_the_figures_are_those_of_the_bench():
    cells = json.loads((RESULTS / "quality/quality.json").read_text())["cells"]
    names = {"magnitude": "magnitude", "wanda": "Wanda", "admm": "ours"}
    for sparsity, measured in advice.ONE_SHOT.items():
        for method, figure in measured.items():
            key = ("stories15M", f"{sparsity:.0%}".replace("%", " %"), names[method])
            found = [
                each["perplexity"]
                for each in cells
                if (each["model"], each["pattern"], each["method"]) == key
            ]
            assert statistics.mean(found) == pytest.approx(figure, rel=0.005), key
    rows = json.loads((RESULTS / "training/gradual.json").read_text())["rows"]
    names = {
        "on a schedule": "GradualPruner, cubic",
        "before the training": "one shot, then train",
        "admm": "admm masks, then train",
    }
    for sparsity, measured in advice.TRAINED.items():
        for method, figure in measured.items():
            key = (names[method], 200, sparsity, 0)
            (found,) = (
                each["perplexity"]
                for each in rows
                if (each["contestant"], each["steps"], each["sparsity"], each["seed"]) == key
            )
            assert found == pytest.approx(figure, rel=0.005), key
    ends = json.loads((RESULTS / "training/ends.json").read_text())["perplexity by end"]
    for share, figure in advice.ENDS.items():
        assert ends[f"{share:g}"] == pytest.approx(figure, rel=0.005), share


def test_a_plan_has_the_remark_once_and_a_sweep_none(tmp_path):
    llama = checkpoints.write(tmp_path / "llama")
    values = {
        "model": {"path": str(llama), "device": "cpu"},
        "prune": {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.7},
        "output": {"path": str(tmp_path / "out")},
    }
    given = Config.model_validate(values)
    notes = jobs.plan(given).notes
    assert notes[-1:] == said_of(given)
    assert jobs._plan_one(given).notes == notes[:-1]
