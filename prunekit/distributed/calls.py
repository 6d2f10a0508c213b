"""Detect deadlocks of ranks by comparing the collectives that they are in.

A rank in a collective waits for all others. That is normal for any time while one of them computes
or writes. It is a deadlock if two are in different collectives, or if all are in one for too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

STALL_SECONDS = 45.0
"""Time after which a collective of all ranks has failed, in addition to that for its bytes."""
SLOWEST_BYTES_PER_SECOND = 10e6
"""Speed below which a network counts as broken."""


class Call(NamedTuple):
    """A collective that a rank is in.

    Attributes:
        number: How many collectives this rank has entered.
        name: Kind, purpose, shape and dtype; equal on all ranks of a sound run.
        seconds: Time that it may take once all ranks are in it.
    """

    number: int
    name: str
    seconds: float

    @classmethod
    def of(cls, number: int, name: str, nbytes: int) -> Call:
        """Return the call of a collective that transfers ``nbytes``.

        Args:
            number: How many collectives the rank has entered.
            name: Kind, purpose, shape and dtype.
            nbytes: Bytes to be transferred.
        """
        return cls(number, name, STALL_SECONDS + nbytes / SLOWEST_BYTES_PER_SECOND)

    def __str__(self) -> str:
        return f"collective {self.number} ({self.name})"


def find_conflict(
    calls: Sequence[Call | None], waited: Sequence[float], names: Sequence[str]
) -> str | None:
    """Return why the ranks wait for each other in vain, or None.

    Args:
        calls: The collective that each rank is in; None while it computes.
        waited: Seconds that each rank has been there.
        names: Name of each rank.
    """
    pairs = combinations(zip(names, calls, strict=True), 2)
    entered = [(one, a, other, b) for (one, a), (other, b) in pairs if a and b]
    different = [each for each in entered if each[1].number == each[3].number]
    different = [each for each in different if each[1].name != each[3].name]
    seconds = min(waited)
    if not different:
        inside = [call for call in calls if call]
        if len(inside) < len(calls) or seconds <= max(call.seconds for call in inside):
            return None
        different = [each for each in entered if each[1].number != each[3].number]
    if different:
        one, a, other, b = different[0]
        return (
            f"{one} waits in {a} while {other} waits in {b}: they do not carry out the same work. "
            "Start all ranks with the same command, config, inputs and versions."
        )
    return (
        f"all ranks, {', '.join(names)}, have waited in {calls[0]} for {seconds:.0f} s: the "
        "network between them does not deliver. GLOO_SOCKET_IFNAME names the interface to use."
    )
