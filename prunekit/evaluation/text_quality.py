"""How varied and how repetitive a generated text is: pure functions of its words.

Every measure is a fraction 0..1 and is 0 where there is nothing to measure.
"""

import re
from collections import Counter
from collections.abc import Hashable, Sequence

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


def words(text: str) -> list[str]:
    """Return the words of a text: letters and digits, apostrophes and hyphens inside, no case."""
    return _WORD.findall(text.casefold())


def lexical_diversity(words: Sequence[Hashable]) -> float:
    """Return the type-token ratio |different words| / |words|.

    It falls as a text grows: compare texts of one length, or use
    :func:`moving_average_type_token_ratio`.
    """
    return _ratio(len(set(words)), len(words))


def moving_average_type_token_ratio(words: Sequence[Hashable], window: int = 50) -> float:
    """Return the mean type-token ratio of all windows of ``window`` neighbouring words.

    A text shorter than one window is one window. Source: Covington & McFall, Cutting the Gordian
    Knot: The Moving-Average Type-Token Ratio (MATTR), J. Quantitative Linguistics 17(2), 2010.
    """
    _check("window", window)
    window = min(window, len(words))
    inside = Counter(words[:window])
    total = len(inside)
    for enters, leaves in zip(words[window:], words, strict=False):
        inside[enters] += 1
        inside[leaves] -= 1
        if not inside[leaves]:
            del inside[leaves]
        total += len(inside)
    return _ratio(total, window * (len(words) - window + 1))


def distinct_n(words: Sequence[Hashable], n: int) -> float:
    """Return |different n-grams| / |n-grams|.

    Source: Li et al., A Diversity-Promoting Objective Function, arXiv:1510.03055, which
    divides by the number of words; n-grams are counted here, so that 1 can be reached.
    """
    _check("n", n)
    grams = list(zip(*(words[start:] for start in range(n)), strict=False))
    return _ratio(len(set(grams)), len(grams))


def repeated_n_grams(words: Sequence[Hashable], n: int) -> float:
    """Return 1 - |different n-grams| / |n-grams|.

    Source: Welleck et al., Neural Text Generation with Unlikelihood Training (seq-rep-n),
    arXiv:1908.04319.
    """
    return 1 - distinct_n(words, n) if len(words) >= n else 0.0


def repetition(words: Sequence[Hashable], window: int = 50) -> float:
    """Return #{i < n - 1 : wᵢ ∈ {wᵢ₊₁ … wᵢ₊window}} / (n - 1).

    That is, how many of the words that have a successor come again among the next ``window``.
    """
    _check("window", window)
    last = len(words) - 1
    next_seen: dict[Hashable, int] = {}
    found = 0
    for i in range(last, -1, -1):
        found += next_seen.get(words[i], i + window + 1) - i <= window
        next_seen[words[i]] = i
    return _ratio(found, last)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole > 0 else 0.0


def _check(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
