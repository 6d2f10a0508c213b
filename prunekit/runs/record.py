"""Records: measured facts of a run, read by progress display and report."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from prunekit.errors import StoppedError
from prunekit.runs.stage import Stage


@dataclass(frozen=True)
class Record:
    """One measured fact of a run.

    Attributes:
        kind: start, phase, step, layer, block, evaluation, finish, or waiting: nothing new, so that
            the run can be stopped.
        name: Subject of the record: a phase, a block, a linear.
        values: The facts; those of ``finish`` are the whole report.
        stage: The stage that begins with it; None for one within a stage.
    """

    kind: str
    name: str
    values: dict[str, Any] = field(default_factory=dict)
    stage: Stage | None = None


def stoppable(records: Iterator[Record], stop: Callable[[], bool]) -> Iterator[Record]:
    """Yield records until ``stop``, called after each but the last, returns True.

    Raises:
        StoppedError: ``stop()`` returned True.
    """
    for record in records:
        yield record
        if stop() and record.kind != "finish":
            raise StoppedError("Stopped as asked.")
