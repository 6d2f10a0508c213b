"""Time estimates of plans: operations divided by a measured speed."""

from dataclasses import replace

import pytest

from prunekit.runs.sparsify.time_estimate import TimeEstimate, estimate_time
from tests.support import checkpoints
from tests.support.checkpoints import planned


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm", "magnitude"])
def test_every_part_that_is_done_takes_time(folder, tmp_path, method):
    found = estimate_time(planned(folder, tmp_path / "out", prune={"method": method}))
    assert min(found.forward, found.gather, found.solve) > 0


def test_what_is_not_gathered_takes_none(folder, tmp_path):
    prune = {"method": "magnitude", "measure_error": False}
    found = estimate_time(planned(folder, tmp_path / "out", prune=prune))
    assert (found.forward, found.gather) == (0, 0)
    assert found.total == found.solve > 0


def test_it_is_that_of_the_slowest_rank(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "prunekit.runs.sparsify.time_estimate._seconds", lambda call, device: (call(), 1.0)[1]
    )
    plan = planned(folder, tmp_path / "out", prune={"method": "sparsegpt"})
    work = replace(plan.work, solve=(1, 3 * plan.work.solve[0]))
    assert estimate_time(replace(plan, work=work)).solve == 3 * estimate_time(plan).solve


def test_it_is_said_a_block_too():
    assert TimeEstimate(40.0, 15.0, 5.0).describe(4).startswith("about 1 min")
