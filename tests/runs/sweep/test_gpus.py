"""Runs are spread over GPUs: a process each, never two on one. The GPUs are counted, not used."""

import os
import time

import pytest
import torch

from prunekit.errors import CapacityError
from prunekit.runs.sweep import gpus
from prunekit.runs.sweep.gpus import environment_of, run_side_by_side, usable_gpus


def busy(folder, name):
    """Hold the GPU that this process sees for a while; fail if another process has it."""
    gpu = os.environ["CUDA_VISIBLE_DEVICES"]
    held = folder / f"gpu{gpu}"
    held.touch(exist_ok=False)
    time.sleep(0.2)
    held.unlink()
    yield "not the last"
    yield name, gpu, os.environ["LOCAL_WORLD_SIZE"]


def refuse():
    raise CapacityError("the disk is full")
    yield


def test_each_gpu_has_one_job_at_a_time_and_all_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7")
    tasks = {name: [(busy, (tmp_path, "first")), (busy, (tmp_path, name))] for name in "abc"}
    found = [each for each in run_side_by_side(tasks, 2) if each is not None]
    assert sorted(name for name, _, _ in found) == [*"abc"]
    assert {place for _, place, _ in found} == {0, 1}
    for name, place, item in found:
        assert item == (name, ("4", "7")[place], "2")
    assert [*run_side_by_side({}, 2)] == []


def test_the_caller_is_asked_while_jobs_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "SECONDS", 0.05)
    slow = {"a": [(busy, (tmp_path, "a"))] * 100}
    running = run_side_by_side(slow, 2)
    began = time.monotonic()
    assert next(running) is None
    running.close()
    assert time.monotonic() - began < 10  # its jobs would take 20


def test_a_job_that_fails_is_named_and_ends_the_others(tmp_path):
    slow = [(busy, (tmp_path, "slow"))] * 50
    began = time.monotonic()
    with pytest.raises(CapacityError, match="bad: the disk is full"):
        [*run_side_by_side({"slow": slow, "bad": [(refuse, ())]}, 2)]
    assert time.monotonic() - began < 5


def test_a_device_that_was_named_is_used_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert usable_gpus(torch.device("cuda")) == 8
    assert usable_gpus(torch.device("cuda:3")) == usable_gpus(torch.device("cpu")) == 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment_of(3, 8) == {"CUDA_VISIBLE_DEVICES": "3", "LOCAL_WORLD_SIZE": "8"}
