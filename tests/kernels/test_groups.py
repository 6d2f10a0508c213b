"""Groups: accepted divisions of a matrix, and encoding as integers."""

import pytest
from prunekit_kernels import Groups

from tests.kernels.selections import GROUPS, INPUTS, OUTPUTS


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_accepts_groups_that_divide(groups):
    groups.check(OUTPUTS, INPUTS)


def test_accepts_an_empty_matrix():
    Groups(None, None, (0,)).check(0, 0)
    Groups(1, None, (0,)).check(3, 0)


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        (Groups(1, 3, (1,)), "neighbours have to divide it"),
        (Groups(1, 128, (1,)), "64 at most"),
        (Groups(2, None, (1,)), "one row and one count, or all rows"),
        (Groups(1, None, (1, 2)), "one row and one count, or all rows"),
        (Groups(None, 4, (1,)), "2 groups need as many counts"),
        (Groups(None, None, (1,), (2, 5)), "tiles have to divide it"),
    ],
)
def test_refuses_groups_that_do_not_divide(groups, reason):
    with pytest.raises(ValueError, match=reason):
        groups.check(4, 8)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_groups_survive_as_numbers(groups):
    assert Groups.of(groups.numbers()) == groups
