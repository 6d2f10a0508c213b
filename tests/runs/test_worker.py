"""Worker processes: yielded items, errors and crashes."""

import glob
import importlib.util
import os
import pickle

import pytest

from prunekit.config.sweep_table import variants
from prunekit.errors import ConfigError, PrunekitError
from prunekit.runs import jobs, worker
from prunekit.runs.sweep.measure import measure


def test_a_worker_yields_raises_and_dies_aloud(monkeypatch, tmp_path):
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


def test_the_fork_server_can_import_all_modules_that_it_preloads():
    """The server silently skips a missing module, and workers then start slowly."""
    for name in worker.PRELOADED:
        assert importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("function", [measure, jobs._run_one])
def test_functions_of_workers_are_found_under_their_names_there(function):
    assert pickle.loads(pickle.dumps(function)) is function
