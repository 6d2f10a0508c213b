"""Failure detection: when one rank dies, the others exit.

Each rank increments a counter in the rendezvous store and watches the counters of the others, in a
background thread. So a failure is detected even while all others wait in a collective. Only
differences of a monotonic clock are used.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from threading import Event, Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT_SECONDS = 0.5
"""Interval between two increments of a rank's counter."""
DEAD_SECONDS = 40.0
"""Time without a beat after which a rank counts as dead; longer than any pause of a live rank."""
SUSPECT_SECONDS = 5.0
"""The same after a collective has failed with a network error."""
GRACE_SECONDS = 2.0
"""Time in which a rank may stop by itself after another has failed, before it is killed."""
FAILURE_KEY = "prunekit failure"
"""Key of the store that holds the message of the first rank that failed."""
RESUME_HINT = "Finished work is kept: run again with --resume, with any number of processes."


class Heartbeat(Thread):
    """Background thread that beats for one rank and watches the others."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        super().__init__(name="prunekit-heartbeat", daemon=True)
        self.rank = rank
        # Separate connections: the original one may be blocked in a collective, and this thread
        # and the main thread may use the store at the same time.
        self._thread_store, self._main_store = store.clone(), store.clone()  # pyright: ignore
        self._last_beats = {other: (0, time.monotonic()) for other in range(size) if other != rank}
        self._finished = Event()
        self._failure: str | None = None

    def run(self) -> None:
        """Beat and watch the others until the run has finished."""
        while not self._finished.wait(BEAT_SECONDS):
            try:
                failure = self._check_peers()
            except RuntimeError:
                failure = "rank 0, which hosts the rendezvous store, does not respond; it has died."
            self._failure = failure
            if failure and not self._finished.wait(GRACE_SECONDS):
                _write_stderr(f"Rank {self.rank} stops: {failure} {RESUME_HINT}")
                os._exit(1)

    def report_failure(self, message: str) -> None:
        """Tell the other ranks that this one fails; the first message counts."""
        with suppress(RuntimeError):  # no rank may be left
            self._main_store.compare_set(FAILURE_KEY, "", f"rank {self.rank} failed: {message}")
            if self.rank == 0:
                # The store ends with this process: give the others time to read the message.
                time.sleep(4 * BEAT_SECONDS)
        self._finished.set()

    def failed_rank(self) -> str:
        """Return which rank failed, after a network error; takes some seconds."""
        end = time.monotonic() + SUSPECT_SECONDS + 2 * BEAT_SECONDS
        while time.monotonic() < end and self.is_alive():
            if self._failure:
                return self._failure
            try:
                if self._main_store.check([FAILURE_KEY]):
                    return self._main_store.get(FAILURE_KEY).decode()
            except RuntimeError:
                return "rank 0, which hosts the rendezvous store, has died."
            time.sleep(BEAT_SECONDS)
        dead = self._silent_ranks(SUSPECT_SECONDS)
        return (
            f"{_rank_list(dead)} died. {RESUME_HINT}"
            if dead
            else "the network between the ranks failed."
        )

    def stop(self) -> None:
        """Stop the thread at the end of the run."""
        self._finished.set()
        self.join()

    def _check_peers(self) -> str | None:
        """Beat, read the beats of the others, return a failure or None."""
        self._thread_store.add(f"prunekit beat {self.rank}", 1)
        if self._thread_store.check([FAILURE_KEY]):
            return self._thread_store.get(FAILURE_KEY).decode()
        now = time.monotonic()
        for other, (before, _) in self._last_beats.items():
            beat = self._thread_store.add(f"prunekit beat {other}", 0)
            if beat != before:
                self._last_beats[other] = beat, now
        dead = self._silent_ranks(DEAD_SECONDS)
        return f"{_rank_list(dead)} has sent no sign for {DEAD_SECONDS:.0f} s." if dead else None

    def _silent_ranks(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [other for other, (_, last) in self._last_beats.items() if now - last > seconds]


def _rank_list(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _write_stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
