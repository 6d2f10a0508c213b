"""Failure detection between two ranks, with a store and a clock of the test."""

import json

import pytest

from prunekit.distributed import heartbeat
from prunekit.distributed.calls import STALL_SECONDS
from prunekit.distributed.heartbeat import DEAD_SECONDS, RESUME_HINT, SUSPECT_SECONDS, Heartbeat
from prunekit.errors import RankError


class DictStore:
    """The operations of a c10d store that a heartbeat uses, on a dict."""

    def __init__(self):
        self.values = {}

    def clone(self):
        return self

    def set(self, key, value):
        self.values[key] = value

    def check(self, keys):
        return all(key in self.values for key in keys)

    def get(self, key):
        return self.values[key].encode()

    def multi_get(self, keys):
        return [self.get(key) for key in keys]

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
def pair(clock, monkeypatch):
    """Return the heartbeats of two ranks on two hosts; their threads are not started."""
    store, made = DictStore(), []
    for rank, host in enumerate("ab"):
        monkeypatch.setattr(heartbeat.socket, "gethostname", lambda host=host: host)
        made.append(Heartbeat(store, rank, 2, "10.0.0.1:29500"))
    exchange(*made)
    made[0]._exchange()  # reads the last status of the other one
    return made


def exchange(*ranks):
    """Let ranks publish their statuses, and read those of the others."""
    for _ in range(2):
        for rank in ranks:
            rank._exchange()


def test_ranks_that_beat_are_alive(pair, clock):
    for _ in range(3):
        clock[0] += DEAD_SECONDS / 2
        exchange(*pair)
        assert pair[0].failure() == pair[1].failure() == ""


def test_a_rank_without_a_beat_counts_as_dead(pair, clock):
    clock[0] += DEAD_SECONDS
    exchange(pair[0])
    assert pair[0].failure() == ""
    clock[0] += 1
    exchange(pair[0])
    assert pair[0].failure() == f"rank 1 on b has sent no sign for {DEAD_SECONDS:.0f} s."


def test_a_store_that_never_answers_is_noticed_by_the_clock_alone(pair, clock):
    clock[0] += DEAD_SECONDS + 1
    assert pair[1].failure() == (
        f"rank 0 on a, where the rendezvous store 10.0.0.1:29500 is, has not answered for "
        f"{DEAD_SECONDS:.0f} s: it hangs, or the network between it and rank 1 on b is cut."
    )


def test_a_store_that_is_gone(pair, monkeypatch):
    def refuse(_):
        raise RuntimeError("Connection reset by peer\n0x7f")

    monkeypatch.setattr(pair[1]._store, "check", refuse)
    pair[1]._publish()
    assert pair[1].failure() == (
        "rank 0 on a, where the rendezvous store 10.0.0.1:29500 is, has died or cannot be reached "
        "(Connection reset by peer)."
    )


def test_the_first_failure_is_the_one_reported(pair):
    pair[1]._message, pair[0]._message = "rank 1 on b failed: disk full", "rank 0 failed: network"
    exchange(pair[1], pair[0])
    assert pair[0].failure() == pair[1].failure() == "rank 1 on b failed: disk full"


def test_a_failure_is_published_with_rank_and_host(pair, monkeypatch):
    monkeypatch.setattr(pair[1]._published, "wait", lambda _: pair[1]._exchange())
    pair[1].report_failure("disk full")
    pair[0]._exchange()
    assert pair[0].failed_rank() == f"rank 1 on b failed: disk full {RESUME_HINT}"


def test_after_a_network_error_a_shorter_silence_is_death(pair, clock, monkeypatch):
    wait = heartbeat.time.sleep

    def sleep(seconds):
        wait(seconds)
        pair[0]._exchange()

    monkeypatch.setattr(heartbeat.time, "sleep", sleep)
    assert pair[0].failed_rank() == f"rank 1 on b has sent no sign for 5 s. {RESUME_HINT}"
    assert clock[0] < 2 * SUSPECT_SECONDS
    exchange(*pair)
    monkeypatch.setattr(heartbeat.time, "sleep", lambda s: (wait(s), exchange(*pair)))
    assert pair[0].failed_rank() == f"the network between the ranks failed. {RESUME_HINT}"


def test_ranks_in_different_collectives_are_named_with_their_places(pair):
    with pair[0].call("sum of scores"), pair[1].call("gather of rows"):
        exchange(*pair)
        for rank in pair:
            assert rank.failure().startswith(
                "rank 0 on a waits in collective 1 (sum of scores) while rank 1 on b waits in "
                "collective 1 (gather of rows): they do not carry out the same work."
            )


def test_a_collective_is_left_and_another_one_entered(pair, clock):
    for _ in range(3):
        with pair[0].call("sum of scores"), pair[1].call("sum of scores"):
            clock[0] += STALL_SECONDS / 2
            exchange(*pair)
            assert pair[0].failure() == ""
    with pair[0].call("sum of scores"), pair[1].call("sum of scores"):
        exchange(*pair)
        clock[0] += STALL_SECONDS + 1
        exchange(*pair)
        assert "the network between them does not deliver" in pair[0].failure()


def test_ranks_join(pair):
    pair[0].wait_for_all(1.0)


def test_a_rank_that_does_not_join_is_named(clock):
    alone = Heartbeat(DictStore(), 0, 3, "10.0.0.1:29500")
    exchange(alone)
    with pytest.raises(RankError, match="rank 1, rank 2 did not join within 9 s; rank 0 on"):
        alone.wait_for_all(9.0)
    assert clock[0] == pytest.approx(9, abs=0.1)


def test_ranks_of_another_number_are_refused(pair):
    status = json.loads(pair[0]._store.values["prunekit status 1"])
    status[3] = 3
    pair[0]._store.values["prunekit status 1"] = json.dumps(status)
    pair[0]._exchange()
    with pytest.raises(RankError, match="rank 1 on b was started as one of 3 ranks"):
        pair[0].wait_for_all(1.0)


def test_two_processes_with_one_rank_are_refused(pair, monkeypatch):
    monkeypatch.setattr(heartbeat.socket, "gethostname", lambda: "c")
    twin = Heartbeat(pair[0]._store, 1, 2, "")
    twin._exchange()
    pair[1]._exchange()
    with pytest.raises(RankError, match="two processes are rank 1, on c and on b"):
        pair[1].wait_for_all(1.0)
