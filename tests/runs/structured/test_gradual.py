"""Units that are pruned while the model is trained: a run, its curves and its bytes."""

import json

import pytest

import prunekit
from prunekit.config.load import load_config
from prunekit.errors import ConfigError
from prunekit.evaluation.verify import verify
from prunekit.runs.structured.planner import plan
from tests.support import checkpoints
from tests.support.checkpoints import same_bytes
from tests.support.structured import write_config

pytestmark = pytest.mark.usefixtures("proof_in_process")

TRAIN = "[train]\nsteps = 8\nrate = 1e-2\nheld_out = 2\nevery = 4\n"
BOTH = 'method = "magnitude"\npattern = ["heads", "neurons"]\nsparsity = 0.5\nend = 6\nevery = 2'


def planned(folder, output, prune, train=TRAIN):
    path = write_config(folder, output, prune, evaluate=False)
    path.write_text(path.read_text() + train)
    return plan(load_config(path))


@pytest.fixture
def no_page(monkeypatch):
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")


def test_gates_of_several_kinds_close_on_one_schedule(llama, tmp_path):
    [*prunekit.run(planned(llama, tmp_path / "out", BOTH))]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["sparsity"]["removed"] == {"heads": [6, 12], "neurons": [96, 192]}
    rows = {row["step"]: row for row in report["training"]["history"]}
    assert rows[0]["factors"] == {"heads": 1.0, "neurons": 1.0}
    assert rows[8]["factors"] == {"heads": 0.5, "neurons": 0.5}
    assert (rows[8]["sparsity"], rows[8]["achieved"]) == (0.5, 0.5)
    assert rows[4]["sparsity"] == pytest.approx(0.5 * (1 - (1 / 3) ** 3))
    assert report["training"]["post"] is None
    assert "Mean gate factor" in (tmp_path / "out/report.html").read_text()
    assert all(check.passed for check in verify(tmp_path / "out"))


@pytest.mark.parametrize(
    "prune",
    [
        'method = "gradient"\npattern = "heads"\nsparsity = 0.5\nend = 4\nregrow = 0.5\n'
        "regrow_every = 3\nuniform = true",
        'method = "random"\npattern = ["blocks", "neurons"]\nsparsity = 0.34\nend = 4',
        'method = "random"\npattern = ["hidden", "heads"]\nsparsity = 0.25\nend = 4',
    ],
)
def test_each_kind_is_removed_after_the_training(llama, tmp_path, no_page, prune):
    [*prunekit.run(planned(llama, tmp_path / "out", prune))]
    assert all(check.passed for check in verify(tmp_path / "out"))


@pytest.mark.parametrize("prune", [BOTH, BOTH.replace("\nend = 6\nevery = 2", "")])
def test_an_adapter_is_merged_before_units_are_removed_or_after(llama, tmp_path, no_page, prune):
    pytest.importorskip("peft")
    train = f"{TRAIN}adapter = {{ rank = 2 }}\n"
    records = [*prunekit.run(planned(llama, tmp_path / "out", prune, train))]
    assert records[-1].values["sparsity"]["removed"] == {"heads": [6, 12], "neurons": [96, 192]}
    assert all(check.passed for check in verify(tmp_path / "out"))
    assert not [name for name in checkpoints.tensors(tmp_path / "out") if "lora" in name]


def test_a_stopped_run_is_resumed_and_writes_the_same_bytes(llama, tmp_path, no_page):
    [*prunekit.run(planned(llama, tmp_path / "whole", BOTH))]
    made = planned(llama, tmp_path / "out", BOTH)
    records = prunekit.run(made)
    for record in records:
        if record.kind == "step" and record.values.get("done") == 4:
            break
    records.close()
    [*prunekit.run(made, resume=True)]
    same_bytes(tmp_path / "out", tmp_path / "whole")


def test_blocks_that_no_config_can_leave_out_are_said_in_the_plan(tmp_path):
    folder = checkpoints.write(tmp_path / "model", "t5")
    with pytest.raises(ConfigError):
        planned(
            folder,
            tmp_path / "out",
            'method = "random"\npattern = "blocks"\nsparsity = 0.5\nend = 4',
        )
