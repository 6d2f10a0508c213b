"""Runs with [distill]: the teacher is the dense model, whatever is pruned and trained."""

import json

import pytest
import torch

import prunekit
from prunekit.cli.main import main
from prunekit.config.distill_table import Distill
from prunekit.config.train_table import Train
from prunekit.runs.distillation import distillation_words
from prunekit.training import keep_masks
from prunekit.training.recover import recover
from prunekit.training.teachers import DenseTeacher, SharedTeacher
from tests.runs.trained.test_run import assert_written, finished, texts
from tests.support import checkpoints
from tests.support.structured import write_config
from tests.support.trained import TRAIN, planned

pytestmark = pytest.mark.usefixtures("proof_in_process")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def no_page(monkeypatch):
    """Skip drawing the HTML report, which other tests cover."""
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")


def test_a_distillation_is_told_in_words():
    assert distillation_words(Distill(layers=0.5, start=2), 9) == (
        "1 · divergence of predictions (temperature 2) + 0.5 · distance of hidden states "
        "(map same), rising to the whole loss from step 2 to 9"
    )


def test_a_run_that_prunes_weights_is_that_of_the_python_interface(llama, tmp_path, no_page):
    """The teacher is the model as it was loaded; the report has the losses."""
    plan = planned(llama, tmp_path / "out", {"sparsity": 0.5}, distill={"end": 4})
    report = finished(plan)
    trained, held_out = texts(llama)
    model = prunekit.load(llama)
    teacher = DenseTeacher(model)
    prunekit.prune(model, torch.cat([trained, held_out]), method="magnitude", sparsity=0.5)
    with keep_masks(model):
        options = {"distill": Distill(end=4), "teacher": teacher}
        [*recover(model, trained, held_out, Train(**TRAIN), **options)]
    assert_written(tmp_path / "out", model)
    first, *rows = report["training"]["history"]
    assert "distillation" not in first
    assert all(row["distillation"].keys() == {"prediction", "layer"} for row in rows)
    assert report["memory"]["distillation_bytes"] == plan.memory["distillation"]


def units(llama, tmp_path, prune, train=""):
    """Run a removal of units with a training and a distillation; return its report."""
    path = write_config(llama, tmp_path / "out", f'method = "magnitude"\n{prune}', evaluate=False)
    path.write_text(
        path.read_text() + f"[train]\nsteps = 6\nrate = 1e-3\nevery = 3\nheld_out = 2\n{train}"
        "[distill]\n"
    )
    assert main(["plan", str(path)]) == 0
    assert main(["run", str(path), "--quiet"]) == 0
    return json.loads((tmp_path / "out/report.json").read_text())


@pytest.mark.parametrize("pattern", ['["heads", "neurons"]', '["blocks", "hidden"]'])
def test_units_are_removed_before_the_training_and_the_teacher_has_them(
    llama, tmp_path, no_page, capsys, pattern
):
    """Of removed blocks and coordinates the report's kept ones are known."""
    report = units(llama, tmp_path, f"pattern = {pattern}\nsparsity = 0.5\n")
    history = report["training"]["history"]
    assert history[-1]["distillation"]["layer"] > 0
    assert "distill" in capsys.readouterr().out


@pytest.mark.parametrize("adapter", [False, True])
def test_units_that_close_while_training_have_the_model_or_its_copy_as_teacher(
    llama, tmp_path, no_page, monkeypatch, adapter
):
    """With an adapter no second model is made."""
    made = []
    for kind in (DenseTeacher, SharedTeacher):
        method = kind.__init__
        monkeypatch.setattr(
            kind, "__init__", lambda self, *a, m=method, k=kind: made.append(k) or m(self, *a)
        )
    train = 'adapter = { rank = 2, targets = ["query"] }\n' if adapter else ""
    if adapter:
        pytest.importorskip("peft")
    prune = 'pattern = ["heads", "neurons"]\nsparsity = 0.5\nend = 3\n'
    report = units(llama, tmp_path, prune, train)
    assert made == [SharedTeacher if adapter else DenseTeacher]
    assert report["training"]["history"][-1]["distillation"]["prediction"] > 0
