"""Exact inputs and comparisons for tests of statistics."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from prunekit.statistics import CrossGram, Gram

tokens = st.integers(0, 40)
features = st.integers(1, 20)
seeds = st.integers(0, 1 << 30)
law = settings(deadline=None, max_examples=20)


def inputs(count, width, seed):
    """Return small integers, whose sums are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, (count, width), generator=generator).float()


def accumulate(kind, *parts):
    statistic = kind(parts[0].shape[1])
    for part in parts:
        if isinstance(statistic, CrossGram):
            statistic.update_pair(part, 2 * part)  # their difference is the part
        else:
            statistic.update(part)
    return statistic


def total(statistic):
    return statistic.full if isinstance(statistic, Gram) else statistic.total


def assert_same(first, second):
    assert first.tokens == second.tokens
    assert torch.equal(total(first), total(second))
