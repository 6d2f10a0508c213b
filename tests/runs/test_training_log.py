"""A training that is stopped goes on from its last state, and ends in the same bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit
from prunekit.checkpoint.output import OutputFolder
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.config.train_table import Train
from prunekit.distributed.ranks import Ranks
from prunekit.errors import CheckpointError
from prunekit.runs.training_log import ENTRY, STATES, Row, TrainingLog, state_files
from prunekit.training import recover as training
from prunekit.training.measure import TrainingStep
from tests.support import checkpoints
from tests.support.adapters import PEFT_WARNS
from tests.support.checkpoints import same_bytes

pytestmark = [
    pytest.mark.usefixtures("proof_in_process"),
    pytest.mark.filterwarnings(*PEFT_WARNS),
]

TRAIN = {
    "steps": 8, "rate": 1e-2, "batch": 4, "held_out": 4, "every": 2, "save_every": 3,
}  # fmt: skip
ADAPTER = TRAIN | {"adapter": {"rank": 2, "targets": ["query", "down"]}}
WEIGHTS = {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.75}
WHILE = {"end": 7, "every": 2, "regrow": 0.2, "regrow_every": 3}
UNITS = {"method": "gradient", "pattern": ["heads", "neurons"], "sparsity": 0.5}
APT = TRAIN | {
    "parameters": 0.6, "rank": 2, "most_rank": 6, "warmup": 1, "window": 2, "windows": 3,
    "decay": 0.4, "save_every": 4,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "after pruning": {"prune": WEIGHTS, "train": TRAIN},
    "weights": {"prune": WEIGHTS | WHILE, "train": TRAIN},
    "frozen weights": {"prune": WEIGHTS | {"method": "sparsegpt", "end": 7}, "train": ADAPTER},
    "distilled": {"prune": WEIGHTS, "train": TRAIN, "distill": {"rank": 2, "end": 6}},
    "units": {"prune": UNITS | WHILE, "train": TRAIN},
    "after removal": {"prune": UNITS, "train": ADAPTER},
    "apt": {"apt": APT | {"kinds": ["hidden", "heads", "neurons"], "parameters": 0.5}},
    "apt distilled": {"apt": APT, "distill": {"rank": 2}},
}
"""Tables of configs whose training is stopped."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"), num_key_value_heads=4)


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")


def planned(folder: Path, output: Path, tables: dict[str, Any]):
    values = {
        "model": {"path": str(folder), "device": "cpu"},
        "calibration": {"data": str(folder / "text.txt"), "samples": 12, "length": 12},
        "output": {"path": str(output)},
    }
    of_units = "apt" in tables or isinstance(tables["prune"]["pattern"], list)
    kind = StructuredConfig if of_units else Config
    return prunekit.plan(kind.model_validate(values | tables))


def stop_after(records, done: int) -> None:
    """Stop a run at the record of a step."""
    for record in records:
        if record.values.get("done") == done:
            break
    records.close()


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_training_goes_on_and_writes_the_same_bytes(case, llama, tmp_path, monkeypatch):
    if "apt" in case or "adapter" in CASES[case].get("train", ()):
        pytest.importorskip("peft")
    list(prunekit.run(planned(llama, tmp_path / "whole", CASES[case])))
    made = planned(llama, tmp_path / "out", CASES[case])
    stop_after(prunekit.run(made), 4)
    saved = 4 if "apt" in case else 3
    assert [file.name for file in (tmp_path / "out").glob("training-state-*")] == [STATES[0]]
    steps, real = [], training.training_step
    monkeypatch.setattr(
        training, "training_step", lambda *parts: (steps.append(1), real(*parts))[1]
    )
    records = [*prunekit.run(made, resume=True)]
    assert len(steps) == 8 - saved
    names = [record.name for record in records if record.kind == "step"]
    assert f"continues after step {saved}" in names
    same_bytes(tmp_path / "out", tmp_path / "whole")
    found, expected = (
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("out", "whole")
    )
    assert found["training"] == expected["training"]
    for layer, other in zip(found["layers"], expected["layers"], strict=True):
        assert layer | {"seconds": 0} == other | {"seconds": 0}
    assert found["files"].keys() == expected["files"].keys()


def test_a_training_may_be_stopped_time_and_again(llama, tmp_path):
    tables = CASES["weights"] | {"train": TRAIN | {"save_every": 1}}
    list(prunekit.run(planned(llama, tmp_path / "whole", tables)))
    made = planned(llama, tmp_path / "out", tables)
    stop_after(prunekit.run(made), 2)
    for done in (4, 6):
        stop_after(prunekit.run(made, resume=True), done)
        assert len([*(tmp_path / "out").glob("training-state-*")]) == 1
    list(prunekit.run(made, resume=True))
    same_bytes(tmp_path / "out", tmp_path / "whole")


def test_early_stopping_counts_over_the_stop(llama, tmp_path, monkeypatch):
    train = TRAIN | {"rate": 1.0, "every": 1, "patience": 3, "save_every": 1}
    tables = {"prune": WEIGHTS, "train": train}
    whole = [*prunekit.run(planned(llama, tmp_path / "whole", tables))][-1].values
    last = whole["training"]["steps"]
    assert 3 <= last < 8
    made = planned(llama, tmp_path / "out", tables)
    stop_after(prunekit.run(made), last)
    monkeypatch.setattr(training, "training_step", lambda *_: 1 / 0)
    list(prunekit.run(made, resume=True))
    same_bytes(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("damage", [b"", b"damaged"])
def test_a_damaged_state_is_not_used_and_an_overwrite_removes_it(llama, tmp_path, damage):
    tables = CASES["after pruning"]
    list(prunekit.run(planned(llama, tmp_path / "whole", tables)))
    made = planned(llama, tmp_path / "out", tables)
    stop_after(prunekit.run(made), 4)
    (tmp_path / "out" / STATES[0]).write_bytes(damage)
    list(prunekit.run(made, resume=True))
    same_bytes(tmp_path / "out", tmp_path / "whole")
    stop_after(prunekit.run(made, overwrite=True), 4)
    stop_after(prunekit.run(made, overwrite=True), 0)
    assert not [*(tmp_path / "out").glob("training-state-*")]


def test_without_saves_the_training_begins_again(llama, tmp_path):
    tables = {"prune": WEIGHTS, "train": TRAIN | {"save_every": 0}}
    made = planned(llama, tmp_path / "out", tables)
    stop_after(prunekit.run(made), 6)
    assert not [*(tmp_path / "out").glob("training-state-*")]
    records = [*prunekit.run(made, resume=True)]
    done = [each.values["done"] for each in records if "done" in each.values]
    assert done == [0, 2, 4, 6, 8]


@pytest.fixture
def output(tmp_path):
    folder = OutputFolder(tmp_path / "out", 1)
    folder.begin("fingerprint", resume=False, overwrite=False, writes=STATES)
    yield folder
    folder.close()


def test_by_default_saving_takes_at_most_a_twentieth_of_the_time(output, monkeypatch):
    now = [0.0]

    def write(*_: object) -> None:
        now[0] += 1.0
        (output.folder / STATES[0]).touch()
        (output.folder / STATES[1]).touch()

    monkeypatch.setattr("prunekit.runs.training_log.write_state", write)
    monkeypatch.setattr("prunekit.runs.training_log.time.perf_counter", lambda: now[0])
    log, saved = TrainingLog(output, Train(steps=100)), []
    for step in range(1, 100):
        log.save(step, dict, is_measured=step % 2 == 0)
        if output.journal.get(ENTRY, {}).get("step") == step:
            saved.append(step)
        now[0] += 5.0
    assert saved == [
        2,
        6,
        10,
        14,
        18,
        22,
        26,
        30,
        34,
        38,
        42,
        46,
        50,
        54,
        58,
        62,
        66,
        70,
        74,
        78,
        82,
        86,
        90,
        94,
        98,
    ]


def test_rows_are_those_that_were_saved(output):
    step = TrainingStep(
        3, 0.1, 2.0, {"a": [1.0]}, 1e-3, 0.5, 0.25, done=False,
        distillation={"layer": 0.5}, details={"units": {"heads": 3}},
    )  # fmt: skip
    log = TrainingLog(output, Train(save_every=1))
    log.rows = [Row(step, {"heads": 0.75})]
    log.save(3, lambda: {"step": 3, "value": torch.tensor([1.5])}, is_measured=False)
    again = TrainingLog(output, Train(save_every=1))
    assert [row.facts() for row in again.rows] == [row.facts() for row in log.rows]
    assert again.rows[0].step.done is False
    assert again.state is not None
    assert again.state["value"].tolist() == [1.5]


def test_the_state_of_other_processes_is_refused(output):
    names = [first for first, _ in state_files(Ranks(0, 2), sharded=True)]
    assert names == [f"training-state-0.{rank}-of-2.safetensors" for rank in (0, 1)]
    assert state_files(Ranks(0, 2), sharded=False) == [STATES]
    output.journal[ENTRY] = {"step": 2, "files": dict.fromkeys(names, "")}
    with pytest.raises(CheckpointError, match=r"in 2 files, .* with as many processes"):
        TrainingLog(output, Train())
