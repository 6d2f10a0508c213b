"""Estimated memory: storage of hidden states, peak of the main loop."""

from dataclasses import replace

import pytest

from prunekit.sparsify import memory_estimate
from prunekit.sparsify.memory_estimate import Memory
from tests.support import checkpoints
from tests.support.checkpoints import planned

NEEDS = {"block": 10, "statistics": 5, "solve": 5, "results": 10, "activations": 1, "vocabulary": 1}


@pytest.mark.parametrize(
    ("apart", "asked", "device", "host", "where"),
    [
        (False, None, 1000, 1000, "device"),
        (False, None, 100, 100, "disk"),  # of 130 in all
        (True, None, 1000, 1000, "device"),
        (True, None, 120, 1000, "host"),
        (True, None, 120, 120, "disk"),
        (True, "device", 1, 1, "device"),
        (True, "disk", 1000, 1000, "disk"),
        (False, "host", 1000, 1000, "device"),
    ],
)
def test_hidden_states_are_as_near_as_there_is_room(apart, asked, device, host, where):
    needs = Memory(**NEEDS, hidden=100, separate_host=apart, prefetched=10 * apart)
    made = needs.placed(asked, device, host)
    assert made.where == where
    assert made.disk == 100 * (where == "disk")
    assert needs.total - made.total == 100 * (where != "device")


def test_the_device_holds_the_larger_of_the_loop_and_the_vocabulary():
    device = Memory(**NEEDS, hidden=100, separate_host=True, prefetched=10, waiting=16)
    assert device.total == 100 + 10 + 10 + max(5 + max(5, 1), 10)
    large = replace(device, vocabulary=1000)
    assert large.total == 100 + 1000
    assert device.host == 10 + 2 * 16 + 10
    alone = replace(device, separate_host=False, prefetched=0, waiting=10)
    assert alone.total == alone.host == 100 + 10 + 10 + max(5 + max(5 + 10, 1), 10)


@pytest.mark.parametrize(
    ("stages", "samples", "peak"),
    [
        ([(1 << 20, 9 << 20), (5 << 20, 1 << 20)], 4, 0),
        # Activations take more than solving, so the stage with the larger statistics counts.
        ([(1 << 10, 9 << 10), (5 << 10, 1 << 10)], 64, 1),
    ],
)
def test_statistics_and_solving_are_of_one_stage(tmp_path, monkeypatch, stages, samples, peak):
    monkeypatch.setattr(memory_estimate, "_stage_bytes", lambda *_: iter(stages))
    folder = checkpoints.write(tmp_path / "model")
    plan = planned(folder, tmp_path / "out", calibration={"samples": samples})
    assert (plan.memory.statistics, plan.memory.solve) == stages[peak]
