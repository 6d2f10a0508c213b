"""Sparsity as a function of the training step.

A schedule takes ``step`` t, ``steps`` T, and the sparsities ``final`` and ``initial``. It returns
exactly ``initial`` at (or before) step 0, and exactly ``final`` at (or after) step T.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from prunekit.errors import ConfigError

Schedule = Callable[[int, int, float, float], float]


def one_shot(step: int, steps: int, final: float, initial: float = 0.0) -> float:
    """Return ``initial`` until the last step, then ``final``."""
    return final if step >= steps else initial


def linear(step: int, steps: int, final: float, initial: float = 0.0) -> float:
    """Return ``initial + (final − initial) · t/T``."""
    return _between(initial, final, _progress(step, steps))


def cubic(step: int, steps: int, final: float, initial: float = 0.0) -> float:
    """Return ``final + (initial − final)(1 − t/T)³`` (Zhu & Gupta, arXiv:1710.01878, eq. 1)."""
    return _between(initial, final, 1 - (1 - _progress(step, steps)) ** 3)


SCHEDULES: dict[str, Schedule] = {"one-shot": one_shot, "linear": linear, "cubic": cubic}


def steps_due(start: int, end: int, frequency: int) -> list[int]:
    """Return the steps at which to prune, including ``end``.

    Args:
        start: First step.
        end: Last step.
        frequency: Steps between two of them.

    Raises:
        ValueError: ``frequency`` is below 1 or ``end`` comes before ``start``.
    """
    if frequency < 1 or end < start:
        raise ValueError(f"need frequency ≥ 1 and start ≤ end, got {frequency}, {start}, {end}")
    return sorted({*range(start, end, frequency), end})


@dataclass(frozen=True)
class PruneSchedule:
    """The sparsity over the steps of an optimizer.

    Attributes:
        name: one-shot (at ``end``), linear or cubic.
        final: Sparsity from step ``end`` on, a fraction.
        end: Last step at which the sparsity changes.
        start: First such step; 0 is before the first step of the optimizer.
        every: Steps between two changes; ``end`` is due in any case.
        initial: Sparsity at ``start``.

    Raises:
        ConfigError: A value is invalid, or the end comes before the start.
    """

    name: str
    final: float
    end: int
    start: int = 0
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ConfigError(f"schedule: {self.name!r} is none of {', '.join(SCHEDULES)}.")
        for key, least in {"start": 0, "end": self.start, "every": 1}.items():
            value = getattr(self, key)
            if type(value) is not int or value < least:
                wanted = f"at least {'start = ' * (key == 'end')}{least}"
                raise ConfigError(f"{key}: {value!r} is not a whole number of {wanted}.")
        if not 0 <= self.final <= 1:
            raise ConfigError(f"sparsity: {self.final!r} is not a fraction from 0 to 1.")
        if not 0 <= self.initial <= self.final:
            raise ConfigError(
                f"initial: {self.initial!r} is not from 0 to the sparsity, {self.final:g}."
            )

    @cached_property
    def due(self) -> tuple[int, ...]:
        """The steps at which the sparsity changes, in ascending order."""
        if self.name == "one-shot":
            first = (self.start,) if self.initial and self.start < self.end else ()
            return (*first, self.end)
        steps = steps_due(self.start, self.end, self.every)
        return tuple(step for step in steps if step > self.start or self.initial or len(steps) == 1)

    def is_due(self, step: int) -> bool:
        """Return whether the sparsity changes at a step."""
        passed = bisect_right(self.due, step)
        return passed > 0 and self.due[passed - 1] == step

    def sparsity(self, step: int) -> float:
        """Return the sparsity of the last due step; before it, 0."""
        passed = bisect_right(self.due, step)
        if not passed:
            return 0.0
        schedule, length = SCHEDULES[self.name], self.end - self.start
        return schedule(self.due[passed - 1] - self.start, length, self.final, self.initial)


def _progress(step: int, steps: int) -> float:
    return 1.0 if step >= steps else max(step, 0) / steps


def _between(initial: float, final: float, share: float) -> float:
    # Unlike initial + (final - initial) * share, exact at both ends.
    return initial * (1 - share) + final * share
