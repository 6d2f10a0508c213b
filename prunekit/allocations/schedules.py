"""Sparsity as a function of the training step.

A schedule takes ``step`` t, ``steps`` T, and the sparsities ``final`` and ``initial``. It returns
exactly ``initial`` at (or before) step 0, and exactly ``final`` at (or after) step T.
"""

from collections.abc import Callable

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


def _progress(step: int, steps: int) -> float:
    return 1.0 if step >= steps else max(step, 0) / steps


def _between(initial: float, final: float, share: float) -> float:
    # Unlike initial + (final - initial) * share, exact at both ends.
    return initial * (1 - share) + final * share
