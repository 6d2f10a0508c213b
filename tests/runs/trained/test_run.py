"""Runs that prune weights and train the model, from config to verified checkpoint."""

import csv
import json

import pytest
import torch
from accelerate import PartialState, tracking

import prunekit
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.config.train_table import Train
from prunekit.data.tokens import calibration_tokens
from prunekit.errors import ConfigError
from prunekit.evaluation.verify import verify
from prunekit.models.vocabulary import load_tokenizer
from prunekit.training import keep_masks
from prunekit.training.gradual import GradualPruner
from prunekit.training.recover import recover
from tests.support import checkpoints
from tests.support.checkpoints import same_bytes
from tests.support.trained import TRAIN, planned

pytestmark = pytest.mark.usefixtures("proof_in_process")

GRADUAL = {"sparsity": 0.75, "end": 6, "every": 2, "scope": "layer"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def no_page(monkeypatch):
    """Skip drawing the HTML report, which other tests cover."""
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")


def finished(plan, **options):
    """Return the report of a run."""
    return [*prunekit.run(plan, **options)][-1].values


def texts(folder):
    """Return the calibration tokens of the runs: to train on, and held out."""
    tokenizer = load_tokenizer(open_checkpoint(folder))
    ids = calibration_tokens(tokenizer, [str(folder / "text.txt")], 12, 12, 0).ids
    return ids[: -TRAIN["held_out"]], ids[-TRAIN["held_out"] :]


def assert_written(folder, model):
    held = checkpoints.tensors(folder)
    for name, value in held.items():
        assert torch.equal(value, model.state_dict()[name]), name


def zeros(folder):
    return {
        name: int((value == 0).sum())
        for name, value in checkpoints.tensors(folder).items()
        if "proj" in name
    }


def test_a_model_that_is_pruned_once_is_that_of_the_python_interface(llama, tmp_path, no_page):
    """prune, then recover under keep_masks; the zeros are those that pruning made."""
    report = finished(planned(llama, tmp_path / "out", {"method": "wanda", "sparsity": 0.5}))
    trained, held_out = texts(llama)
    model = prunekit.load(llama)
    prunekit.prune(model, torch.cat([trained, held_out]), method="wanda", sparsity=0.5)
    before = {name: int((value == 0).sum()) for name, value in model.state_dict().items()}
    with keep_masks(model):
        [*recover(model, trained, held_out, Train(**TRAIN))]
    assert_written(tmp_path / "out", model)
    assert zeros(tmp_path / "out").items() <= before.items()
    for layer in report["layers"]:
        scores = layer["score_statistics"]
        assert 0 <= scores["min"] < scores["mean"] < scores["max"]
    facts = report["training"]
    assert facts["base"] < facts["post"]
    assert facts["final"] < facts["post"]
    assert {row["achieved"] for row in facts["history"]} == {report["sparsity"]["achieved"]}


def test_a_model_that_is_pruned_while_training_is_that_of_the_python_interface(
    llama, tmp_path, no_page
):
    report = finished(planned(llama, tmp_path / "out", GRADUAL))
    trained, held_out = texts(llama)
    model = prunekit.load(llama)
    settings = {"sparsity": 0.75, "scope": "layer", "end": 6, "every": 2}
    [
        *recover(
            model,
            trained,
            held_out,
            Train(**TRAIN),
            during=lambda optimizer: GradualPruner(model, optimizer, **settings),
        )
    ]
    assert_written(tmp_path / "out", model)
    assert report["sparsity"]["achieved"] == 0.75
    facts = report["training"]
    assert (facts["post"], facts["recovery"]) == (None, None)
    found = {row["step"]: (row["sparsity"], row["achieved"]) for row in facts["history"]}
    assert found[0] == (0, 0)
    assert found[4] == pytest.approx((0.75 * (1 - (1 / 3) ** 3),) * 2, abs=2e-3)
    assert found[8] == (0.75, 0.75)
    assert facts["final"] == next(row for row in facts["history"] if row["step"] == 8)["held_out"]


@pytest.mark.parametrize(
    ("model_type", "prune", "format"),
    [
        ("gpt2", {"method": "admm", "pattern": "2:4", "propagation": "stage"}, "2:4"),
        ("gpt2", {**GRADUAL, "method": "wanda", "regrow": 0.2}, "bitmask"),
        ("mixtral", GRADUAL, "dense"),
        ("mixtral", {"sparsity": 0.5}, "dense"),
        ("llama", {"method": "wanda", "pattern": "2:4", "permute": True}, "2:4"),
        ("llama", {**GRADUAL, "pattern": "block:4x4", "scope": None}, "dense"),
        ("llama", {"method": "sparsegpt", "pattern": "2:4", "end": 3}, "2:4"),
    ],
)
def test_each_family_and_format_is_verified(tmp_path, no_page, model_type, prune, format):  # noqa: A002
    folder = checkpoints.write(tmp_path / "model", model_type, dtype=torch.bfloat16)
    prune = {key: value for key, value in prune.items() if value is not None}
    report = finished(planned(folder, tmp_path / "out", prune, output={"format": format}))
    assert [check.passed for check in verify(tmp_path / "out")] == [True] * 4
    assert report["sparsity"]["violations"] == 0
    assert report["sparsity"]["achieved"] == pytest.approx(report["sparsity"]["target"], abs=0.01)
    held = checkpoints.tensors(tmp_path / "out").values()
    floats = {value.dtype for value in held if value.is_floating_point()}
    assert floats == {torch.bfloat16}


@pytest.mark.parametrize("prune", [GRADUAL, {"sparsity": 0.5}])
def test_an_adapter_alone_is_trained_and_merged_without_filling_zeros(
    llama, tmp_path, no_page, prune
):
    pytest.importorskip("peft")
    train = {"adapter": {"rank": 2, "targets": ["query", "down"]}}
    report = finished(planned(llama, tmp_path / "out", prune, train=train))
    before, after = checkpoints.tensors(llama), checkpoints.tensors(tmp_path / "out")
    changed = {
        name.split(".")[-2]
        for name in before
        if not torch.equal(after[name][after[name] != 0], before[name][after[name] != 0])
    }
    assert changed == {"q_proj", "down_proj"}
    assert report["sparsity"]["achieved"] == pytest.approx(prune["sparsity"], abs=0.01)
    assert [check.passed for check in verify(tmp_path / "out")] == [True] * 4


@pytest.mark.parametrize("prune", [GRADUAL, {"sparsity": 0.5}])
def test_a_stopped_run_is_resumed_and_writes_the_same_bytes(llama, tmp_path, no_page, prune):
    finished(planned(llama, tmp_path / "whole", prune))
    plan = planned(llama, tmp_path / "out", prune)
    for stop in (1, 3, 20):
        records = prunekit.run(plan)
        for _ in range(stop):
            next(records)
        records.close()
        assert not (tmp_path / "out/report.json").exists()
        finished(plan, resume=True)
        same_bytes(tmp_path / "out", tmp_path / "whole")
        finished(plan, overwrite=True)
        same_bytes(tmp_path / "out", tmp_path / "whole")
        records = prunekit.run(plan, overwrite=True)
        next(records)
        records.close()
        for file in (tmp_path / "out").iterdir():
            file.unlink()


def test_the_curves_are_in_the_report_and_beside_it(llama, tmp_path):
    finished(planned(llama, tmp_path / "out", GRADUAL))
    report = json.loads((tmp_path / "out/report.json").read_text())
    with (tmp_path / "out/training.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [int(row["step"]) for row in rows] == [0, 4, 8]
    assert rows[1].keys() == {"step", "loss", "held_out", "rate", "asked", "counted"}
    assert [float(row["counted"]) for row in rows] == [
        row["achieved"] for row in report["training"]["history"]
    ]
    page = (tmp_path / "out/report.html").read_text()
    assert "<h2>Training</h2>" in page
    assert "Sparsity during training" in page
    assert prunekit.cli.main.main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/report.html").read_text() == page


def test_the_learning_rate_and_progress_follow_the_steps(llama, tmp_path, no_page):
    records = [*prunekit.run(planned(llama, tmp_path / "out", GRADUAL))]
    phases = [record.name for record in records if record.kind == "phase"]
    assert phases == ["train", "export", "verify"]
    (train,) = [record for record in records if record.name == "train"]
    assert train.values["steps"] == 8
    steps = [record for record in records if record.kind == "step"]
    assert [record.values["done"] for record in steps] == [0, 4, 8]
    assert steps[1].name.startswith("step 4, loss ")
    assert steps[1].name.endswith("% pruned")
    rates = [row["rate"] for row in records[-1].values["training"]["history"]]
    assert rates[0] is None
    assert rates[1] > rates[2] == pytest.approx(1e-3)


def test_a_sparsity_below_the_zeros_of_the_model_is_refused(llama, tmp_path, no_page):
    finished(planned(llama, tmp_path / "out", {"sparsity": 0.5}))
    (tmp_path / "out/text.txt").write_text(checkpoints.TEXT)
    plan = planned(tmp_path / "out", tmp_path / "again", {"sparsity": 0.3, "end": 4})
    with pytest.raises(ConfigError, match=r"sparsity: 0\.3 is below the zeros"):
        finished(plan)


def test_a_sparsity_that_was_rounded_down_is_remarked(llama, tmp_path, no_page):
    """32 inputs of a row: 22 are pruned where 22.4 are asked for."""
    report = finished(planned(llama, tmp_path / "out", {"method": "wanda", "sparsity": 0.7}))
    (remark,) = [note for note in report["notes"] if note.startswith("prune.sparsity")]
    assert remark.startswith("prune.sparsity: 70 % of the weights were asked for as zeros, 68.75 %")
    assert "rounded down" in remark


def test_trackers_get_the_rows_of_the_report(llama, tmp_path, no_page, monkeypatch):
    logged = []

    class Notes(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "notes", True, None

        def __init__(self, run_name, logging_dir):
            super().__init__()
            assert (run_name, logging_dir) == ("out", tmp_path / "out/trackers")

        def store_init_configuration(self, values):
            assert values["prune/end"] == 6

        def log(self, values, step=None, **_):
            logged.append((step, values["achieved"]))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notes", Notes)
    plan = planned(llama, tmp_path / "out", GRADUAL, train={"log_with": ["notes"]})
    history = finished(plan)["training"]["history"]
    PartialState._reset_state()
    assert logged == [(row["step"], row["achieved"]) for row in history]
