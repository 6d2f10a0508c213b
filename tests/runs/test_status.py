"""Status of a run: from its records into a file, and back."""

import contextlib
import json

import pytest

from prunekit.checkpoint.output import OutputFolder
from prunekit.errors import CheckpointError, ConfigError, NumericsError, StoppedError
from prunekit.runs import status as module
from prunekit.runs.record import Record
from prunekit.runs.stage import Stage
from prunekit.runs.status import STATUS, Status, StatusFile, followed, read_status

RECORDS = [
    Record("start", "", {"blocks": 2}, Stage.CALIBRATING),
    Record("phase", "rank heads", {"steps": 4}, Stage.SCORING),
    Record("step", "a"),
    Record("step", "b", {"done": 3}),
    Record("phase", "prune", {"steps": 2}, Stage.PRUNING),
    Record("layer", "x"),
    Record("block", "0", {"index": 0}),
    Record("block", "1", {"index": 1}),
    Record("phase", "export", {"steps": 1}, Stage.EXPORTING),
    Record("phase", "verify", {"steps": 1}, Stage.VERIFYING),
    Record("finish", "", {}),
]


def started(records, error=None):
    yield from records
    if error:
        raise error


@pytest.fixture(autouse=True)
def every_write(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.0)


def test_each_record_moves_the_status_on(tmp_path):
    found = []
    for _ in followed(started(RECORDS), tmp_path, writes=True):
        values = json.loads((tmp_path / STATUS).read_text())
        found.append((values["stage"], values["done"], values["steps"], values["progress"]))
    assert found == [
        ("calibrating", 0, 0, None),
        ("scoring", 0, 4, 0.0),
        ("scoring", 1, 4, 0.25),
        ("scoring", 3, 4, 0.75),
        ("pruning", 0, 2, 0.0),
        ("pruning", 0, 2, 0.0),
        ("pruning", 1, 2, 0.5),
        ("pruning", 2, 2, 1.0),
        ("exporting", 0, 1, 0.0),
        ("verifying", 0, 1, 0.0),
        ("verifying", 0, 1, 0.0),
    ]
    assert read_status(tmp_path).stage is Stage.COMPLETE
    assert json.loads((tmp_path / STATUS).read_text())["title"] == "Complete"


@pytest.mark.parametrize(
    ("error", "stage", "words"),
    [
        (NumericsError("layer 3 is NaN"), Stage.FAILED, "layer 3 is NaN"),
        (ZeroDivisionError(), Stage.FAILED, "ZeroDivisionError"),
        (StoppedError("as asked"), Stage.STOPPED, "--resume"),
        (KeyboardInterrupt(), Stage.STOPPED, "--resume"),
    ],
)
def test_an_error_ends_it(tmp_path, error, stage, words):
    with pytest.raises(type(error)):
        [*followed(started(RECORDS[:4], error), tmp_path, writes=True)]
    found = read_status(tmp_path)
    assert found.stage is stage
    assert words in (found.error or "")


def test_a_run_that_is_closed_is_stopped_and_its_records_are_closed_first(tmp_path):
    closed = []

    def records():
        try:
            yield from RECORDS
        finally:
            closed.append((tmp_path / STATUS).exists())

    run = followed(records(), tmp_path, writes=True)
    next(run)
    run.close()
    assert closed == [True]
    assert read_status(tmp_path).stage is Stage.STOPPED


def test_what_fails_before_its_first_record_leaves_the_folder_alone(tmp_path):
    with pytest.raises(ConfigError):
        [*followed(started([], ConfigError("in use")), tmp_path, writes=True)]
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ConfigError, match="holds no run"):
        read_status(tmp_path)


def test_other_ranks_write_nothing(tmp_path):
    [*followed(started(RECORDS), tmp_path, writes=False)]
    assert not [*tmp_path.iterdir()]


def test_a_stage_that_cannot_follow_is_a_mistake(tmp_path):
    file = StatusFile(tmp_path, writes=False)
    file.follow(RECORDS[0])
    file.follow(RECORDS[4])
    with pytest.raises(ValueError, match="a run that is pruning cannot become calibrating"):
        file.follow(RECORDS[0])


def test_a_run_that_was_killed_is_stopped_and_one_that_lives_is_not(tmp_path):
    output = OutputFolder(tmp_path, 1)
    output.begin("same", resume=False, overwrite=False)
    assert read_status(tmp_path) == Status()
    file = StatusFile(tmp_path, writes=True)
    for record in RECORDS[:5]:
        file.follow(record)
    assert read_status(tmp_path).stage is Stage.PRUNING
    output.close()
    found = read_status(tmp_path)
    assert found.stage is Stage.STOPPED
    assert found.error == "was killed while pruning; continue it with --resume"


@pytest.mark.parametrize("error", [None, StoppedError("as asked")])
def test_a_run_that_is_resumed_runs_before_its_first_record(tmp_path, error):
    for resume in (False, True):
        output = OutputFolder(tmp_path, 1)
        output.begin("same", resume=resume, overwrite=False)
        assert read_status(tmp_path) == Status()
        with contextlib.suppress(StoppedError):
            [*followed(started(RECORDS, error), tmp_path, writes=True)]
        output.close()
        assert read_status(tmp_path).stage.ended


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stage": "sleeping"}'])
def test_a_damaged_file_is_one_error(tmp_path, text):
    (tmp_path / STATUS).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{STATUS}: is damaged"):
        read_status(tmp_path)
