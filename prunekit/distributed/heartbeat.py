"""Knows when one of the processes that share a run has died, and ends the others.

Each counts up a beat in the store by which they met, and looks at the beats of the others; so a
death is seen whatever the others are waiting for. Only differences of a monotonic clock are used.
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

BEAT = 0.5
SILENCE = 40.0
"""Seconds without a beat after which a rank is held dead: longer than any pause of a live one."""
SUSPECT = 5.0
"""The same once the network says that something is wrong."""
GRACE = 2.0
"""Seconds in which a rank may say itself that it stops, once another has failed."""
FAILURE = "prunekit failure"
RESUME_HINT = (
    "What was finished is kept: run again with --resume, with as many processes as you like."
)


class Heartbeat(Thread):
    """Beats for one rank and listens to the others, in the background."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        super().__init__(name="prunekit-watch", daemon=True)
        self.rank = rank
        # Connections of their own: the first one may be waiting when the others are needed.
        self._own, self._other = store.clone(), store.clone()  # pyright: ignore
        self._seen = {other: (0, time.monotonic()) for other in range(size) if other != rank}
        self._over = Event()
        self._heard: str | None = None

    def run(self) -> None:
        """Beat and listen until the run is over."""
        while not self._over.wait(BEAT):
            try:
                failure = self._listen()
            except RuntimeError:
                failure = "rank 0, which the others meet at, does not answer; it has died."
            self._heard = failure
            if failure and not self._over.wait(GRACE):
                _say(f"Rank {self.rank} stops: {failure} {RESUME_HINT}")
                os._exit(1)

    def report(self, message: str) -> None:
        """Tell the others that this rank fails; the first one to say so counts."""
        with suppress(RuntimeError):  # there may be nobody left to tell
            self._other.compare_set(FAILURE, "", f"rank {self.rank} failed: {message}")
            if self.rank == 0:
                time.sleep(4 * BEAT)  # so that they read it: the store may go with this process
        self._over.set()

    def failed_rank(self) -> str:
        """Say who failed, now that the network says that somebody did; takes some seconds."""
        end = time.monotonic() + SUSPECT + 2 * BEAT
        while time.monotonic() < end and self.is_alive():
            if self._heard:
                return self._heard
            try:
                if self._other.check([FAILURE]):
                    return self._other.get(FAILURE).decode()
            except RuntimeError:
                return "rank 0, which the others meet at, has died."
            time.sleep(BEAT)
        dead = self._silent(SUSPECT)
        return (
            f"{_named(dead)} died. {RESUME_HINT}"
            if dead
            else "the network between the ranks failed."
        )

    def end(self) -> None:
        """Stop, for all is done."""
        self._over.set()
        self.join()

    def _listen(self) -> str | None:
        self._own.add(f"prunekit beat {self.rank}", 1)
        if self._own.check([FAILURE]):
            return self._own.get(FAILURE).decode()
        now = time.monotonic()
        for other, (before, _) in self._seen.items():
            beat = self._own.add(f"prunekit beat {other}", 0)
            if beat != before:
                self._seen[other] = beat, now
        dead = self._silent(SILENCE)
        return f"{_named(dead)} has not been heard of for {SILENCE:.0f} s." if dead else None

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [other for other, (_, heard) in self._seen.items() if now - heard > seconds]


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
