"""Failure detection between two ranks, with a store and a clock of the test."""

import pytest

from prunekit.distributed import heartbeat
from prunekit.distributed.heartbeat import DEAD_SECONDS, RESUME_HINT, SUSPECT_SECONDS, Heartbeat


class DictStore:
    """The operations of a c10d store that a heartbeat uses, on a dict."""

    def __init__(self):
        self.values = {}

    def clone(self):
        return self

    def add(self, key, amount):
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)

    def get(self, key):
        return self.values[key].encode()

    def compare_set(self, key, expected, value):
        if self.values.get(key, "") == expected:
            self.values[key] = value


@pytest.fixture
def clock(monkeypatch):
    """Return a list of one number, the time in seconds; sleeping advances it."""
    now = [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(heartbeat.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    return now


@pytest.fixture
def pair(clock):
    """Return the heartbeats of two ranks; their threads are not started."""
    store = DictStore()
    return Heartbeat(store, 0, 2), Heartbeat(store, 1, 2)


def test_ranks_that_beat_are_alive(pair, clock):
    for _ in range(3):
        clock[0] += DEAD_SECONDS / 2
        pair[1]._check_peers()
        assert pair[0]._check_peers() is None


def test_a_rank_without_a_beat_counts_as_dead(pair, clock):
    first, second = pair
    second._check_peers()
    assert first._check_peers() is None
    clock[0] += DEAD_SECONDS
    assert first._check_peers() is None
    clock[0] += 1
    assert first._check_peers() == f"rank 1 has sent no sign for {DEAD_SECONDS:.0f} s."


def test_the_first_failure_is_the_one_reported(pair):
    first, second = pair
    second.report_failure("disk full")
    first.report_failure("network")
    assert first._check_peers() == "rank 1 failed: disk full"


def test_after_a_network_error_a_shorter_silence_is_death(pair, clock):
    first, second = pair
    second._check_peers()
    first._check_peers()
    assert first.failed_rank() == "the network between the ranks failed."
    clock[0] += SUSPECT_SECONDS + 1
    assert first.failed_rank() == f"rank 1 died. {RESUME_HINT}"


def test_a_failure_is_reported_while_the_thread_runs(pair, monkeypatch):
    first, second = pair
    monkeypatch.setattr(first, "is_alive", lambda: True)
    second.report_failure("NaN")
    assert first.failed_rank() == "rank 1 failed: NaN"
