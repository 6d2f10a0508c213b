"""Scores with ties and NaN, and a reference selection for patterns."""

import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from prunekit.patterns.unstructured import BLOCK_COLUMNS

SCOPES = ["row", "layer", "block"]
scopes = pytest.mark.parametrize("scope", SCOPES)
sparsities = st.one_of(st.sampled_from([0.0, 0.29, 0.5, 1.0]), st.floats(0, 1))
seeds = st.integers(0, 1 << 30)
law = settings(deadline=None, max_examples=25)
few = st.integers(1, 6)
some = st.integers(1, 12)


@st.composite
def scores(draw, outputs=few, inputs=some, values=5):
    """Draw scores with many ties, some NaN and some inf."""
    shape = draw(outputs), draw(inputs)
    generator = torch.Generator().manual_seed(draw(seeds))
    score = torch.randint(0, values, shape, generator=generator).float()
    for value in (math.nan, math.inf):
        if draw(st.booleans()):
            score[torch.rand(shape, generator=generator) < 0.1] = value
    return score


def without_lowest(score, pruned):
    """Return the kept entries of one group, computed in plain Python.

    Ties keep the lower index, and NaN is pruned first.
    """
    worth = [-math.inf if math.isnan(value) else value for value in score.flatten().tolist()]
    order = sorted(range(len(worth)), key=lambda i: (worth[i], -i))
    keep = torch.ones(len(worth), dtype=torch.bool)
    keep[order[:pruned]] = False
    return keep.view(score.shape)


def groups(score, scope):
    if scope == "row":
        return [score[row : row + 1] for row in range(len(score))]
    return [score] if scope == "layer" else list(score.split(BLOCK_COLUMNS, dim=1))
