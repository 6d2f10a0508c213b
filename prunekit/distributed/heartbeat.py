"""Failure detection: when a rank dies, hangs or diverges, all exit.

Each rank publishes its status in the rendezvous store twice a second and reads those of the others,
so a failure is detected even while all wait in a collective. One thread talks to the store, which
may never answer; another only reads this process's monotonic clock, and ends the process.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING, NamedTuple

from prunekit.distributed.calls import Call, find_conflict
from prunekit.errors import RankError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT_SECONDS = 0.5
"""Interval between two statuses of a rank."""
DEAD_SECONDS = 40.0
"""Time without a new status after which a rank counts as dead; longer than any pause of a live one.
The same holds for the rendezvous store."""
SUSPECT_SECONDS = 5.0
"""The same after a collective has failed with a network error."""
GRACE_SECONDS = 2.0
"""Time in which a rank may stop by itself after another has failed, before it is killed."""
FAILURE_KEY = "prunekit failure"
"""Key of the store that holds the message of the first failure."""
LAUNCHER = "PRUNEKIT_LAUNCHER"
"""Variable with the id of the process that started the ranks of this machine."""
RESUME_HINT = "Finished work is kept: run again with --resume, with any number of processes."


class Status(NamedTuple):
    """Status of a rank, as the others read it.

    Attributes:
        beat: Number of statuses so far.
        host: Name of the rank's machine.
        process: Unique identifier of its process.
        size: Number of ranks, as it was told.
        call: The collective that it is in.
    """

    beat: int
    host: str
    process: str
    size: int
    call: Call | None

    @classmethod
    def parse(cls, content: bytes) -> Status:
        """Return the status from the content of its key."""
        beat, host, process, size, call = json.loads(content)
        return cls(beat, host, process, size, Call(*call) if call else None)


class Heartbeat:
    """Publishes the status of one rank and watches those of the others."""

    def __init__(self, store: Store, rank: int, size: int, address: str = "") -> None:
        """Prepare; :meth:`start` begins.

        Args:
            store: The rendezvous store, on the host of rank 0.
            rank: Rank of this process.
            size: Number of ranks.
            address: Address of the store, for messages.
        """
        self.rank, self.size, self.address = rank, size, address
        self.host = socket.gethostname()
        # A connection of its own: the original one may be blocked in a collective.
        self._store = store.clone()  # pyright: ignore
        self._process = uuid.uuid4().hex
        self._launcher = os.environ.get(LAUNCHER)
        self._beat = self._calls = 0
        self._call: Call | None = None
        self._statuses: dict[int, Status] = {}
        self._answered = time.monotonic()
        self._changed = dict.fromkeys(range(size), self._answered)
        self._called = dict.fromkeys(range(size), self._answered)
        self._message = self._reported = self._lost = ""
        self._wake, self._published = Event(), Event()
        self._finished, self._closed = Event(), Event()
        self._threads = [
            Thread(target=work, name=f"prunekit-{name}", daemon=True)
            for name, work in (("heartbeat", self._publish), ("watch", self._watch))
        ]

    def start(self) -> None:
        """Begin to publish and to watch."""
        for thread in self._threads:
            thread.start()

    def wait_for_all(self, seconds: float) -> None:
        """Wait until all ranks have published a status.

        Raises:
            RankError: A rank did not in time, or the ranks are not those of one run.
        """
        end = time.monotonic() + seconds
        while len(self._statuses) < self.size and time.monotonic() < end:
            if failure := self.failure():
                raise RankError(failure)
            time.sleep(BEAT_SECONDS / 10)
        if failure := self.failure():
            raise RankError(failure)
        if missing := [rank for rank in range(self.size) if rank not in self._statuses]:
            joined = self.names([*self._statuses])
            raise RankError(
                f"{self.names(missing)} did not join within {seconds:.0f} s; {joined} did. The "
                f"process may have died at startup, or its host does not reach {self.address}. "
                f"{RESUME_HINT}"
            )

    @contextmanager
    def call(self, name: str, nbytes: int = 0) -> Iterator[None]:
        """Tell the others that this rank is in a collective.

        Args:
            name: Kind, purpose, shape and dtype; equal on all ranks.
            nbytes: Bytes to be transferred.
        """
        self._calls += 1
        self._call = Call.of(self._calls, name, nbytes)
        yield
        # Not after an exception: the others then see where it was raised.
        self._call = None

    def report_failure(self, message: str) -> None:
        """Tell the other ranks that this one fails; the first message counts."""
        self._finished.set()
        self._message = self._message or f"{self.names([self.rank])} failed: {message}"
        self._wake.set()
        # Bounded, because the store itself may fail.
        if self._published.wait(SUSPECT_SECONDS) and self.rank == 0 and not self._lost:
            # The store ends with this process: give the others time to read the message.
            time.sleep(4 * BEAT_SECONDS)
        self._closed.set()

    def failed_rank(self) -> str:
        """Return which rank failed, after a network error; takes some seconds."""
        end = time.monotonic() + SUSPECT_SECONDS + 2 * BEAT_SECONDS
        while time.monotonic() < end:
            if failure := self.failure():
                return with_hint(failure)
            time.sleep(BEAT_SECONDS)
        failure = self.failure(SUSPECT_SECONDS)
        return with_hint(failure or "the network between the ranks failed.")

    def stop(self) -> None:
        """Stop at the end of the run."""
        self._finished.set()
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            # The store may have ended with rank 0, and the thread wait for it.
            thread.join(SUSPECT_SECONDS)

    def names(self, ranks: list[int]) -> str:
        """Return the names of ranks, with their hosts where known."""
        hosts = {rank: status.host for rank, status in self._statuses.items()}
        hosts[self.rank] = self.host
        return ", ".join(
            f"rank {rank} on {hosts[rank]}" if rank in hosts else f"rank {rank}" for rank in ranks
        )

    def failure(self, dead_after: float | None = None) -> str:
        """Return the failure that is known so far, or an empty string.

        Args:
            dead_after: Silence after which a rank or the store is dead; None: that of a run.
        """
        limit = DEAD_SECONDS if dead_after is None else dead_after
        if self._reported:
            return self._reported
        if self._launcher and str(os.getppid()) != self._launcher:
            return f"the process {self._launcher}, which started the ranks, has ended."
        first = f"{self.names([0])}, where the rendezvous store {self.address} is,"
        if self._lost:
            return f"{first} has died or cannot be reached ({self._lost})."
        if time.monotonic() - self._answered > limit:
            return (
                f"{first} has not answered for {limit:.0f} s: it hangs, or the network between it "
                f"and {self.names([self.rank])} is cut."
            )
        return self._failure_of_peers(limit)

    def _failure_of_peers(self, limit: float) -> str:
        # Counted up to the last answer of the store: later statuses are not known.
        silent = [r for r in self._statuses if self._answered - self._changed[r] > limit]
        if silent:
            return f"{self.names(silent)} has sent no sign for {limit:.0f} s."
        for rank, status in self._statuses.items():
            if status.size != self.size:
                return (
                    f"{self.names([rank])} was started as one of {status.size} ranks, "
                    f"{self.names([self.rank])} as one of {self.size}. WORLD_SIZE must be equal."
                )
        own = self._statuses.get(self.rank)
        if own and own.process != self._process:
            return f"two processes are rank {self.rank}, on {own.host} and on {self.host}."
        if len(self._statuses) < self.size:
            return ""
        everyone = range(self.size)
        calls = [self._statuses[rank].call for rank in everyone]
        waited = [self._answered - self._called[rank] for rank in everyone]
        return find_conflict(calls, waited, [self.names([rank]) for rank in everyone]) or ""

    def _publish(self) -> None:
        """Exchange statuses until the run has ended or the store fails."""
        while not self._lost:
            closed = self._closed.is_set()
            try:
                self._exchange()
            except RuntimeError as error:
                self._lost = str(error).splitlines()[0]
            if self._message or self._lost:
                self._published.set()
            if closed:
                return
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()

    def _exchange(self) -> None:
        """Exchange statuses with all ranks, and read the first failure."""
        if self._message:
            self._store.compare_set(FAILURE_KEY, "", self._message)
        ranks = [
            rank
            for rank in range(self.size)
            if rank in self._statuses or self._store.check([_key(rank)])
        ]
        contents = self._store.multi_get([_key(rank) for rank in ranks]) if ranks else []
        statuses, now = dict(zip(ranks, map(Status.parse, contents), strict=True)), time.monotonic()
        for rank, status in statuses.items():
            before = self._statuses.get(rank)
            if before is None or before.beat != status.beat:
                self._changed[rank] = now
            if before is None or before.call != status.call:
                self._called[rank] = now
        self._statuses = statuses
        self._beat += 1
        own = Status(self._beat, self.host, self._process, self.size, self._call)
        self._store.set(_key(self.rank), json.dumps(own))
        if self._store.check([FAILURE_KEY]):
            self._reported = self._store.get(FAILURE_KEY).decode()
        self._answered = time.monotonic()

    def _watch(self) -> None:
        """End this process if it does not end after a failure."""
        while not self._finished.wait(BEAT_SECONDS):
            if failure := self.failure():
                self._message = self._message or failure
                self._wake.set()
                if not self._finished.wait(GRACE_SECONDS):
                    _write_stderr(f"Rank {self.rank} stops: {with_hint(failure)}")
                    os._exit(1)


def with_hint(failure: str) -> str:
    """Return a failure with the way to go on."""
    return failure if "--resume" in failure else f"{failure} {RESUME_HINT}"


def _key(rank: int) -> str:
    return f"prunekit status {rank}"


def _write_stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
