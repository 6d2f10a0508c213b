"""Ranks that wait for each other in vain, and those that only wait."""

import pytest

from prunekit.distributed.calls import SLOWEST_BYTES_PER_SECOND, STALL_SECONDS, Call, find_conflict

NAMES = ("rank 0 on a", "rank 1 on b", "rank 2 on c")
SUM, ROWS = "sum of statistics, float32 [4, 4]", "gather of rows, float32 [4, 4]"
LONG = STALL_SECONDS + 1


def conflict(calls, waited=(0.0, 0.0, 0.0)):
    made = [each and Call.of(*each, nbytes=0) for each in calls]
    return find_conflict(made, waited, NAMES)


def test_ranks_in_different_collectives_of_one_number_are_named_at_once():
    found = conflict([(7, SUM), None, (7, ROWS)])
    assert found.startswith(
        f"rank 0 on a waits in collective 7 ({SUM}) while rank 2 on c waits in collective 7 "
        f"({ROWS}): they do not carry out the same work."
    )


@pytest.mark.parametrize(
    ("calls", "waited"),
    [
        ([(7, SUM), (7, SUM), None], [1e6, 1e6, 1e6]),  # the third may compute for long
        ([(7, SUM), (6, ROWS), None], [1e6, 1e6, 1e6]),  # they may both wait for the third
        ([(7, SUM), (7, SUM), (7, SUM)], [LONG, LONG, STALL_SECONDS - 1]),
        ([(7, SUM), (7, SUM), (6, ROWS)], [LONG, LONG, STALL_SECONDS - 1]),
        ([None, None, None], [1e6, 1e6, 1e6]),
    ],
)
def test_waiting_for_a_rank_that_computes_or_has_just_come_is_in_order(calls, waited):
    assert conflict(calls, waited) is None


def test_all_ranks_waiting_in_collectives_of_different_numbers():
    found = conflict([(7, SUM), (7, SUM), (6, ROWS)], [LONG] * 3)
    assert "rank 0 on a waits in collective 7" in found
    assert "rank 2 on c waits in collective 6" in found


def test_a_collective_in_which_all_are_has_to_end():
    found = conflict([(7, SUM)] * 3, [LONG] * 3)
    assert "the network between them does not deliver" in found
    assert all(name in found for name in NAMES)


def test_large_transfers_have_more_time():
    call = Call.of(7, SUM, nbytes=int(100 * SLOWEST_BYTES_PER_SECOND))
    assert find_conflict([call] * 3, [STALL_SECONDS + 99] * 3, NAMES) is None
    assert find_conflict([call] * 3, [STALL_SECONDS + 101] * 3, NAMES)
