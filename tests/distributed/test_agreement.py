"""Differences between the facts of ranks: named, with values and ranks."""

from hypothesis import given
from hypothesis import strategies as st

from prunekit.distributed.agreement import (
    LONGEST_VALUE,
    MOST_DIFFERENCES,
    find_differences,
    flatten,
)

NAMES = ["rank 0 on a", "rank 1 on b", "rank 2 on b"]
FACTS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 1) | st.just({"x": 0}) | st.none())


def differences(*every):
    return find_differences([dict(flatten(facts)) for facts in every], NAMES[: len(every)])


def test_a_setting_that_differs_is_named_with_its_values_and_ranks():
    same = {"prune": {"damping": 0.01, "method": "sparsegpt"}}
    other = {"prune": {"damping": 0.1, "method": "sparsegpt"}}
    assert differences(same, other, same) == [
        "prune.damping: 0.01 on rank 0 on a, rank 2 on b; 0.1 on rank 1 on b"
    ]


def test_a_setting_of_one_rank_alone():
    assert differences({"a": 1}, {}) == ["a: 1 on rank 0 on a; not set on rank 1 on b"]


def test_tables_that_are_empty_are_facts_too():
    assert differences({"a": {}}, {"a": {"b": 1}}) == [
        "a: {} on rank 0 on a; not set on rank 1 on b",
        "a.b: not set on rank 0 on a; 1 on rank 1 on b",
    ]


def test_messages_stay_short():
    many = {str(number): "x" * 1000 for number in range(MOST_DIFFERENCES + 3)}
    lines = differences(many, {})
    assert lines[-1] == "and 3 more"
    assert len(lines) == MOST_DIFFERENCES + 1
    assert max(map(len, lines)) < LONGEST_VALUE + 80


@given(FACTS, FACTS)
def test_only_equal_facts_have_no_differences(one, other):
    assert (differences(one, other) == []) == (one == other)
