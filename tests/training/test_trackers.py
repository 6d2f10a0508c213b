"""Trackers of accelerate follow a training; those that cannot are refused."""

from pathlib import Path

import pytest
from accelerate import PartialState, tracking

from prunekit.distributed.ranks import Ranks
from prunekit.errors import ConfigError
from prunekit.training.trackers import check_trackers, trackers

SETTINGS = {"train": {"steps": 20, "rate": 0.5, "adapter": None}, "prune": {"pattern": "2:4"}}


@pytest.fixture(autouse=True)
def _state_of_accelerate():
    yield
    PartialState._reset_state()


@pytest.fixture
def tracker(monkeypatch):
    """A tracker named "notes", registered as a package would do it; and the calls of it."""
    calls = []

    class Notes(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "notes", True, None

        def __init__(self, run_name, logging_dir):
            super().__init__()
            calls.append(("made", run_name, logging_dir))

        @tracking.on_main_process
        def start(self):
            tracking.logger.debug("accelerate's trackers log messages, which needs its state")
            calls.append(("start",))

        def store_init_configuration(self, values):
            calls.append(("settings", values))

        def log(self, values, step=None, **_):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish",))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notes", Notes)
    return Notes, calls


def test_a_tracker_gets_settings_and_the_facts_of_each_step(tracker, tmp_path):
    check_trackers(["notes"])
    with trackers(["notes", "notes"], "run", tmp_path, SETTINGS) as log:
        log(0, {"loss": None, "held_out": 2.5, "factors": {"heads": 1.0}})
        log(10, {"loss": 3, "sparsity": 0.25})
    assert tracker[1] == [
        ("made", "run", tmp_path),
        ("start",),
        ("settings", {"train/steps": 20, "train/rate": 0.5, "prune/pattern": "2:4"}),
        ("log", 0, {"held_out": 2.5, "factors/heads": 1.0}),
        ("log", 10, {"loss": 3, "sparsity": 0.25}),
        ("finish",),
    ]


def test_a_tracker_is_finished_when_the_training_fails(tracker, tmp_path):
    with pytest.raises(ZeroDivisionError), trackers(["notes"], "run", tmp_path, {}):
        raise ZeroDivisionError
    assert tracker[1][-1] == ("finish",)


def test_without_trackers_nothing_is_started(tmp_path):
    with trackers([], "run", tmp_path, SETTINGS) as log:
        log(1, {"loss": 1.0})
    assert PartialState._shared_state == {}


class Second(Ranks):
    """Rank 1 of two, to which rank 0 sends a result."""

    def run_on_main(self, work, leader=0):
        assert not self.is_main


def test_only_rank_0_logs(tracker, tmp_path):
    with trackers(["notes"], "run", tmp_path, SETTINGS, Second(1, 2)) as log:
        log(1, {"loss": 1.0})
    assert tracker[1] == []


def test_a_tracker_that_cannot_be_started_is_an_error_of_the_config(tracker, tmp_path, monkeypatch):
    def fail(_):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(tracker[0], "start", fail)
    message = 'train.log_with: "notes" cannot be started: api_key not configured'
    with pytest.raises(ConfigError, match=message), trackers(["notes"], "run", tmp_path, {}):
        pass
    assert tracker[1] == [("made", "run", tmp_path)]


def test_unknown_trackers_and_missing_packages_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r'"tensorbord" is not a tracker .* Choose: aim, .*wandb'):
        check_trackers(["tensorbord"])
    monkeypatch.setattr("prunekit.training.trackers.get_available_trackers", list)
    with pytest.raises(ConfigError, match=r'"comet_ml" needs its package: pip install comet-ml\.'):
        check_trackers(["comet_ml"])
    check_trackers([])


def test_tensorboard_writes_its_files(tmp_path):
    pytest.importorskip("tensorboard")
    with trackers(["tensorboard"], "run", tmp_path, SETTINGS) as log:
        log(1, {"loss": 1.0, "factors": {"heads": 0.5}})
    assert [*Path(tmp_path, "run").glob("events.out.tfevents.*")]
