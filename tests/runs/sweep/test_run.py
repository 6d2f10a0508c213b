"""Several runs from one config: what is accepted, planned, carried out, taken up and shown."""

import csv
import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prunekit.cli.main import main
from prunekit.config.load import load_config
from prunekit.config.run_config import StructuredConfig
from prunekit.config.schema import schema
from prunekit.config.sweep_table import variants
from prunekit.errors import ConfigError, PrunekitError
from prunekit.runs import jobs, worker
from prunekit.runs.sweep import run as sweep_running
from prunekit.structured.agreement import spearman
from tests.support import checkpoints

BASE = """\
[model]
path = "{model}"
device = "cpu"
[calibration]
data = "{model}/text.txt"
samples = 4
length = 12
[prune]
pattern = "neurons"
{prune}
[sweep]
{sweep}
[evaluate]
data = "{model}/text.txt"
length = 12
windows = 2
[output]
path = "{output}"
"""
TWO = 'method = ["obs", { name = "flap", standardised = false }]\nsparsity = [0.25, 0.5]\n'


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"))


def written(folder, output, sweep, prune="", text=BASE):
    path = Path(output).with_suffix(".toml")
    path.write_text(text.format(model=folder, output=output, sweep=sweep, prune=prune))
    return path


def test_each_value_meets_each_other_and_every_run_has_a_folder(llama, tmp_path):
    config = load_config(written(llama, tmp_path / "out", TWO))
    assert list(config.runs) == [
        "obs-0.25", "obs-0.5", "flap+standardised+False-0.25", "flap+standardised+False-0.5",
    ]  # fmt: skip
    alone = config.apart("flap+standardised+False-0.5")
    assert isinstance(alone, StructuredConfig)
    assert alone.output.path == str(tmp_path / "out/runs/flap+standardised+False-0.5")
    assert alone.prune.model_dump()["standardised"] is False
    plan = jobs.plan(config)
    assert [plan.series(name) for name in plan.runs] == ["obs"] * 2 + [
        "flap, standardised False"
    ] * 2


def test_weights_are_swept_by_the_same_table(llama, tmp_path):
    text = BASE.replace("{prune}", "{prune}\nmethod = 'wanda'").replace('"neurons"', '"2:4"')
    path = written(llama, tmp_path / "out", 'pattern = ["2:4", "heads"]', text=text)
    with pytest.raises(ConfigError, match=r"\.toml:11: prune\.method: \"wanda\" is not a method"):
        load_config(path)
    path = written(llama, tmp_path / "out", 'pattern = ["2:4", "4:8"]', text=text)
    plan = jobs.plan(load_config(path))
    assert [plan.series(name) for name in plan.runs] == ["wanda, 2:4", "wanda, 4:8"]


def test_all_mistakes_are_said_at_once_and_once(llama, tmp_path):
    sweep = 'method = ["obs", "tast", "entropy"]\nsparsity = [0.5, 2.0]\nleast = 3\ntokens = -1'
    path = written(llama, tmp_path / "out", sweep, text=BASE.replace("[evaluate]", "[elevate]"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).count("least: 3 is not a list of values") == 1
    assert ":11: sweep: needs [evaluate]" in str(caught.value)
    assert ":15: sweep.tokens: -1 is not possible: at least 0." in str(caught.value)
    path = written(llama, tmp_path / "out", sweep.replace("least = 3\ntokens = -1", ""))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text = str(caught.value)
    assert text.count("\n") == 2
    assert ':12: prune.method: "tast" is not a method.' in text
    assert ":13: prune.sparsity: 2.0 is not possible" in text
    assert ":9: prune.pattern: entropy ranks heads, not neurons." in text


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("", "names no key of [prune]"),
        ("method = []", "method: [] is not a list of values"),
        ('method = ["obs", "obs"]', "obs is there twice"),
    ],
)
def test_a_table_that_makes_no_runs_is_refused(llama, tmp_path, sweep, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(written(llama, tmp_path / "out", sweep, "sparsity = 0.5"))


def test_the_preset_sentinel_has_the_numbers_of_that_benchmark(tmp_path):
    """Levels, learning rate, early stop, intervals, samples, batch and length, in one config."""
    path = tmp_path / "sentinel.toml"
    assert main(["init", str(path), "--preset", "sentinel"]) == 0
    (tmp_path / "demo/SmolLM2-135M-Instruct").mkdir(parents=True)
    made = load_config(path)
    assert len(made.runs) == 12
    assert {run.prune.sparsity for run in made.runs.values()} == {0.1, 0.3, 0.5}
    train = made.first.train
    assert (train.rate, train.patience, train.every, train.batch) == (1e-5, 5, 50, 4)
    assert (train.held_out, made.first.calibration.length, made.sweep.tokens) == (100, 128, 50)


def test_a_plan_says_which_runs_cannot_be(llama, tmp_path):
    sweep = 'pattern = ["heads", "neurons"]\nsparsity = [0.5, 0.99]'
    path = written(llama, tmp_path / "out", sweep, 'method = "obs"\n')
    path.write_text(path.read_text().replace('pattern = "neurons"\n', ""))
    with pytest.raises(ConfigError, match=r"^heads-0\.99: sparsity: \d+ units should go"):
        jobs.plan(load_config(path))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def here(monkeypatch):
    """Carry out runs in this process and count them: another takes seconds to import torch."""
    seen = []

    def call(function, *given) -> Iterator[object]:
        seen.append(function.__name__)
        return function(*given)

    monkeypatch.setattr(sweep_running, "run_in_subprocess", call)
    return seen


def test_a_sweep_is_carried_out_taken_up_and_shown(llama, tmp_path, here):
    sweep = 'tokens = 2\nkeep = false\nmethod = ["obs"]\nsparsity = [0.25, 0.5]'
    path = written(llama, tmp_path / "out", sweep)
    assert main(["run", str(path), "--quiet"]) == 0
    assert here == ["measure", *["_run_one", "measure"] * 2]
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
    here.clear()
    more = written(llama, tmp_path / "out", sweep.replace("0.5]", "0.5, 0.7]"))
    assert main(["run", str(more), "--quiet"]) == 2
    assert main(["run", str(more), "--quiet", "--resume"]) == 0
    assert here == ["_run_one", "measure"]
    assert main(["report", str(tmp_path / "out")]) == 0


def test_a_sweep_of_rankers_says_how_far_they_agree(llama, tmp_path, here):
    """Spearman's ρ between the methods and to leave-one-out, as numbers and as a picture."""
    sweep = 'tokens = 0\nmethod = ["magnitude", "leave-one-out", "random"]\nsparsity = [0.5]'
    text = BASE.replace('"neurons"', '"heads"')
    path = written(llama, tmp_path / "out", sweep, text=text)
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


def test_the_schema_has_the_table(llama):
    jsonschema = pytest.importorskip("jsonschema")
    base = {"model": {"path": "m"}, "output": {"path": "o"}, "calibration": {"data": "pydoc:train"}}
    base["prune"] = {"method": "obs", "pattern": "heads", "sparsity": 0.5}
    validator = jsonschema.Draft202012Validator(schema())
    assert validator.is_valid(base | {"sweep": {"method": ["obs"], "tokens": 3}})
    assert not validator.is_valid(base | {"sweep": {"method": "obs"}})


def test_another_process_yields_raises_and_dies_aloud(monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "PRELOADED", [])
    (tmp_path / "one").touch()
    assert list(worker.run_in_subprocess(glob.iglob, str(tmp_path / "*"))) == [
        str(tmp_path / "one")
    ]
    with pytest.raises(ConfigError, match="method: 3 is not a list"):
        list(worker.run_in_subprocess(variants, {"method": 3}))
    with pytest.raises(RuntimeError, match="TypeError"):
        list(worker.run_in_subprocess(glob.iglob, 3))
    with pytest.raises(PrunekitError, match="ended with exit code 7"):
        list(worker.run_in_subprocess(os._exit, 7))
