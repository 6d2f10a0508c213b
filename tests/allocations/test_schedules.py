"""Sparsity schedules: sparsity as a function of the step."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.allocations.schedules import SCHEDULES, cubic, linear, one_shot, steps_due

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
