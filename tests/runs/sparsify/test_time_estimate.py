"""Time estimates of plans: operations divided by a measured speed."""

from dataclasses import replace

import pytest

from prunekit.runs.sparsify.time_estimate import estimate_time
from tests.support import checkpoints
from tests.support.checkpoints import planned


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm", "magnitude"])
def test_every_part_that_is_done_takes_time(folder, tmp_path, method):
    found = estimate_time(planned(folder, tmp_path / "out", prune={"method": method}))
    assert min(found.parts.values()) > 0


def test_what_is_not_gathered_takes_none(folder, tmp_path):
    prune = {"method": "magnitude", "measure_error": False}
    found = estimate_time(planned(folder, tmp_path / "out", prune=prune))
    assert (found.parts["forward"], found.parts["gathering"]) == (0, 0)
    assert found.total == found.parts["solving"] > 0


def test_it_is_that_of_the_slowest_rank(folder, tmp_path, monkeypatch):
    for module in ("time_estimate", "sparsify.time_estimate"):
        name = f"prunekit.runs.{module}.shortest_seconds"
        monkeypatch.setattr(name, lambda call, device: (call(), 1.0)[1])
    plan = planned(folder, tmp_path / "out", prune={"method": "sparsegpt"})
    work = replace(plan.work, solve=(1, 3 * plan.work.solve[0]))
    more, once = (estimate_time(each).parts["solving"] for each in (replace(plan, work=work), plan))
    assert more == 3 * once
