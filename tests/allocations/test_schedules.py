"""Sparsity schedules: sparsity as a function of the step."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.allocations.schedules import (
    SCHEDULES,
    PruneSchedule,
    cubic,
    linear,
    one_shot,
    steps_due,
)
from prunekit.errors import ConfigError

every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
fractions = st.floats(0, 1)


@every
@given(steps=st.integers(1, 1000), final=fractions, initial=fractions)
def test_the_ends_are_exact(schedule, steps, final, initial):
    assert schedule(0, steps, final, initial) == initial
    assert schedule(steps, steps, final, initial) == final


@every
@given(beyond=st.integers(1, 100), steps=st.integers(1, 100), final=fractions, initial=fractions)
def test_nothing_changes_before_the_first_and_after_the_last_step(
    schedule, beyond, steps, final, initial
):
    assert schedule(-beyond, steps, final, initial) == initial
    assert schedule(steps + beyond, steps, final, initial) == final


@every
@given(steps=st.integers(1, 60), ends=st.tuples(fractions, fractions).map(sorted))
def test_sparsity_never_falls_nor_leaves_the_ends(schedule, steps, ends):
    initial, final = ends
    values = [schedule(step, steps, final, initial) for step in range(steps + 1)]
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(values))
    assert all(initial - 1e-12 <= value <= final + 1e-12 for value in values)


def test_one_shot_gives_the_sparsity_itself_and_not_a_share_of_it():
    assert [one_shot(step, 3, 0.7) for step in range(5)] == [0, 0, 0, 0.7, 0.7]


def test_linear_rises_by_the_same_every_step():
    assert [linear(step, 4, 0.5, 0.1) for step in range(5)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5]
    )


@pytest.mark.parametrize(("step", "sparsity"), [(25, 0.4047), (50, 0.6125), (75, 0.6891)])
def test_cubic_has_the_published_values(step, sparsity):
    assert cubic(step, 100, 0.7) == pytest.approx(sparsity, abs=5e-5)


def test_cubic_starts_from_the_initial_sparsity():
    assert cubic(1, 2, 0.9, 0.1) == pytest.approx(0.9 - 0.8 / 8)


@given(st.integers(0, 50), st.integers(1, 50), fractions, fractions)
def test_cubic_sparsity_and_cubic_density_are_one_curve(step, steps, density, initial):
    left = (1 - min(step, steps) / steps) ** 3
    remaining = density + (1 - initial - density) * left
    assert 1 - cubic(step, steps, 1 - density, initial) == pytest.approx(remaining, abs=1e-12)


@given(st.integers(2, 100), st.fractions(0, 1), st.floats(0.1, 1))
def test_cubic_is_never_behind_linear(steps, share, final):
    step = round(share * steps)
    assert cubic(step, steps, final) >= linear(step, steps, final) - 1e-12


@given(st.integers(0, 1000), st.integers(0, 300), st.integers(1, 400))
def test_the_last_step_is_always_due(start, length, frequency):
    due = steps_due(start, start + length, frequency)
    assert due[0] == start
    assert due[-1] == start + length
    assert due == sorted(set(due))
    assert all((step - start) % frequency == 0 for step in due[:-1])
    assert all(later - earlier <= frequency for earlier, later in pairwise(due))


def test_an_end_between_two_updates_is_due_too():
    assert steps_due(100, 1050, 300) == [100, 400, 700, 1000, 1050]


@pytest.mark.parametrize("wrong", [(0, 10, 0), (0, 10, -5), (10, 9, 1)])
def test_refuses_a_frequency_below_one_and_an_end_before_the_start(wrong):
    with pytest.raises(ValueError, match="frequency ≥ 1 and start ≤ end"):
        steps_due(*wrong)


@every
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 50), st.sampled_from([0.0, 0.2]))
def test_a_prune_schedule_ends_at_its_sparsity_and_never_falls(
    schedule, start, length, frequency, initial
):
    name = next(name for name, each in SCHEDULES.items() if each is schedule)
    planned = PruneSchedule(name, 0.7, start + length, start, frequency, initial)
    values = [planned.sparsity(step) for step in range(start + length + 3)]
    assert values[: planned.due[0]] == [0.0] * planned.due[0]
    assert values[start + length :] == [0.7] * 3
    assert all(later >= earlier for earlier, later in pairwise(values))
    changes = [step for step, pair in enumerate(pairwise([0.0, *values])) if pair[0] != pair[1]]
    assert set(changes) <= set(planned.due)


def test_due_steps_of_a_cubic_schedule_to_70_percent():
    planned = PruneSchedule("cubic", 0.7, 100, 0, 25)
    assert planned.due == (25, 50, 75, 100)
    found = [planned.sparsity(step) for step in planned.due]
    assert found == pytest.approx([0.4047, 0.6125, 0.6891, 0.7], abs=5e-5)
    assert planned.sparsity(49) == found[0]


def test_one_shot_is_due_once():
    assert PruneSchedule("one-shot", 0.5, 7, 2).due == (7,)
    assert PruneSchedule("cubic", 0.5, 3, 3).due == (3,)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "cosine"}, "schedule: 'cosine' is none of one-shot, linear, cubic"),
        ({"every": 0}, "every: 0 is not a whole number of at least 1"),
        ({"start": 20}, "end: 10 is not a whole number of at least start = 20"),
        ({"start": -1}, "start: -1 is not a whole number of at least 0"),
        ({"end": 1.5}, "end: 1.5 is not a whole number"),
        ({"final": 1.2}, "sparsity: 1.2 is not a fraction"),
        ({"final": float("nan")}, "sparsity: nan is not a fraction"),
        ({"initial": 0.9}, "initial: 0.9 is not from 0 to the sparsity, 0.5"),
    ],
)
def test_a_prune_schedule_refuses_impossible_values(wrong, message):
    values = {"name": "cubic", "final": 0.5, "end": 10} | wrong
    with pytest.raises(ConfigError, match=message):
        PruneSchedule(**values)
