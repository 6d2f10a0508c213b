"""Diversity and repetition measures of text, as functions of its words.

Every measure is a fraction 0..1, and 0 for text that is too short to measure.
"""

import re
from collections import Counter
from collections.abc import Hashable, Sequence

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


def words(text: str) -> list[str]:
    """Split text into case-folded words, keeping inner apostrophes and hyphens."""
    return _WORD.findall(text.casefold())


def lexical_diversity(words: Sequence[Hashable]) -> float:
    """Return the type-token ratio |distinct words| / |words|.

    It decreases with the length of a text: compare texts of equal length, or use
    :func:`moving_average_type_token_ratio`.
    """
    return _ratio(len(set(words)), len(words))


def moving_average_type_token_ratio(words: Sequence[Hashable], window: int = 50) -> float:
    """Return the mean type-token ratio over all windows of consecutive words.

    A text shorter than ``window`` words is one window. Source: Covington & McFall, Cutting the
    Gordian Knot: The Moving-Average Type-Token Ratio (MATTR), J. Quantitative Linguistics 17(2),
    2010.
    """
    _check("window", window)
    window = min(window, len(words))
    counts = Counter(words[:window])
    total = len(counts)
    for added, removed in zip(words[window:], words, strict=False):
        counts[added] += 1
        counts[removed] -= 1
        if not counts[removed]:
            del counts[removed]
        total += len(counts)
    return _ratio(total, window * (len(words) - window + 1))


def distinct_n(words: Sequence[Hashable], n: int) -> float:
    """Return |distinct n-grams| / |n-grams|.

    Source: Li et al., A Diversity-Promoting Objective Function, arXiv:1510.03055, which
    divides by the number of words; dividing by n-grams makes 1 reachable.
    """
    _check("n", n)
    grams = list(zip(*(words[start:] for start in range(n)), strict=False))
    return _ratio(len(set(grams)), len(grams))


def repeated_n_grams(words: Sequence[Hashable], n: int) -> float:
    """Return 1 - |distinct n-grams| / |n-grams|.

    Source: Welleck et al., Neural Text Generation with Unlikelihood Training (seq-rep-n),
    arXiv:1908.04319.
    """
    return 1 - distinct_n(words, n) if len(words) >= n else 0.0


def repetition(words: Sequence[Hashable], window: int = 50) -> float:
    """Return the fraction of words that recur within the next ``window``.

    ``#{i < n - 1 : wᵢ ∈ {wᵢ₊₁ … wᵢ₊window}} / (n - 1)``; the last word is not counted.
    """
    _check("window", window)
    last = len(words) - 1
    next_seen: dict[Hashable, int] = {}
    repeated = 0
    for i in range(last, -1, -1):
        repeated += next_seen.get(words[i], i + window + 1) - i <= window
        next_seen[words[i]] = i
    return _ratio(repeated, last)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole > 0 else 0.0


def _check(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
