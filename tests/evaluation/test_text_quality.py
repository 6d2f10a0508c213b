"""Diversity and repetition measures against their definitions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.evaluation.text_quality import (
    distinct_n,
    lexical_diversity,
    moving_average_type_token_ratio,
    repeated_n_grams,
    repetition,
    words,
)

some_words = st.lists(st.sampled_from("abcde"), max_size=30)
sizes = st.integers(1, 12)
ROSE = ("a", "rose", "is", "a", "rose", "is", "a", "rose")


def test_words_ignore_case_and_punctuation_and_keep_inner_marks():
    text = "The dog\u2019s bone -- a DOG'S well-known bone, 2 of them!"
    assert words(text) == [
        *("the", "dog\u2019s", "bone", "a", "dog's", "well-known", "bone", "2", "of", "them")
    ]


@pytest.mark.parametrize("text", ["", " \n", "…!?"])
def test_text_without_words_is_zero_everywhere(text):
    none = words(text)
    assert none == []
    assert lexical_diversity(none) == 0
    assert moving_average_type_token_ratio(none) == 0
    assert distinct_n(none, 1) == 0
    assert repeated_n_grams(none, 1) == 0
    assert repetition(none) == 0


def test_one_word_is_fully_diverse_and_repeats_nothing():
    one = ["a"]
    assert lexical_diversity(one) == 1
    assert moving_average_type_token_ratio(one) == 1
    assert distinct_n(one, 1) == 1
    assert repetition(one) == 0
    assert distinct_n(one, 2) == repeated_n_grams(one, 2) == 0


def test_lexical_diversity_counts_types_over_tokens():
    assert lexical_diversity(ROSE) == 3 / 8


def test_moving_average_of_windows_of_three():
    # a b a: 2/3, b a c: 1, a c c: 2/3
    assert moving_average_type_token_ratio(list("abacc"), window=3) == pytest.approx(7 / 9)


def test_n_grams_of_a_rose():
    # Seven bigrams, three of them distinct: a-rose, rose-is, is-a.
    assert distinct_n(ROSE, 2) == 3 / 7
    assert repeated_n_grams(ROSE, 2) == pytest.approx(4 / 7)


def test_repetition_looks_at_exactly_the_next_window_words():
    spaced = ["a", *"bcde", "a"]
    assert repetition(spaced, window=5) == 1 / 5
    assert repetition(spaced, window=4) == 0


def test_repetition_never_counts_the_last_word():
    assert repetition(list("aaaa")) == 1


@pytest.mark.parametrize("measure", [moving_average_type_token_ratio, repetition])
def test_window_of_nothing_is_refused(measure):
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        measure(["a"], window=0)


@pytest.mark.parametrize("measure", [distinct_n, repeated_n_grams])
def test_zero_grams_are_refused(measure):
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        measure(["a"], 0)


@given(some_words, sizes)
def test_moving_average_equals_its_definition(text, window):
    size = min(window, len(text))
    windows = [text[start : start + size] for start in range(len(text) - size + 1)]
    exact = sum(len(set(part)) / len(part) for part in windows) / len(windows) if text else 0
    assert moving_average_type_token_ratio(text, window) == pytest.approx(exact)


@given(some_words, sizes)
def test_repetition_equals_its_definition(text, window):
    last = len(text) - 1
    found = sum(text[i] in text[i + 1 : i + 1 + window] for i in range(last))
    assert repetition(text, window) == (found / last if last > 0 else 0)


@given(some_words, st.integers(1, 4))
def test_distinct_and_repeated_n_grams_are_one_together(text, n):
    assert distinct_n(text, n) + repeated_n_grams(text, n) == (1 if len(text) >= n else 0)


@given(some_words, sizes)
def test_measures_stay_between_zero_and_one_and_ignore_names(text, window):
    renamed = [ord(word) for word in text]
    for measure in (moving_average_type_token_ratio, repetition):
        value = measure(text, window)
        assert 0 <= value <= 1
        assert measure(renamed, window) == value


@given(some_words)
def test_a_window_wider_than_the_text_is_the_whole_text(text):
    assert moving_average_type_token_ratio(text, 100) == lexical_diversity(text)
