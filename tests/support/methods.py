"""Layers, activations and checks for tests of pruning methods."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from prunekit.methods import Scored, methods
from prunekit.methods.layer import Layer
from prunekit.patterns import parse, pruned_count
from prunekit.patterns.n_of_m import NOfM
from prunekit.patterns.tiles import Tiles
from prunekit.patterns.unstructured import Unstructured
from prunekit.statistics import ColumnEnergy, Gram, StageStatistics

OUTPUTS, INPUTS = 12, 144  # two blocks of 128 columns, of which the last one is partial
PATTERNS = [
    *(Unstructured(scope) for scope in ("row", "layer", "block")),
    *map(parse, ["2:4", "4:8", "1:3", "15:16", "block:4x8", "block:3x9", "row", "column"]),
]
law = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 1 << 30)
every_method = pytest.mark.parametrize(
    "method", [kind() for kind in methods().values()], ids=lambda method: method.name
)
every_pattern = pytest.mark.parametrize(
    "pattern", PATTERNS, ids=lambda pattern: f"{pattern.name} {getattr(pattern, 'scope', '')}"
)


def tokens(count=200, inputs=INPUTS, seed=0):
    """Return correlated activations with outliers, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 6 + 1, inputs, generator=generator)
    x = torch.randn(count, inputs // 6 + 1, generator=generator) @ mixing
    x += torch.randn(count, inputs, generator=generator)
    x[:, :: max(inputs // 5, 1)] *= 15
    return x


def weights(outputs=OUTPUTS, inputs=INPUTS, seed=1):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def layer(pattern="unstructured", sparsity=0.5, x=None, weight=None, name="layer"):
    """Return a layer with a Gram matrix and column energy."""
    x = tokens() if x is None else x
    weight = weights(inputs=x.shape[1]) if weight is None else weight
    gathered = [kind(x.shape[1]) for kind in (Gram, ColumnEnergy)]
    for statistic in gathered:
        statistic.update(x)
    pattern = parse(pattern) if isinstance(pattern, str) else pattern
    return Layer(name, weight, StageStatistics(gathered), pattern, sparsity)


def expected_count(pattern, sparsity, shape):
    outputs, inputs = shape
    size = outputs * inputs
    if isinstance(pattern, NOfM):
        return size // pattern.m * (pattern.m - pattern.n)
    if isinstance(pattern, Tiles):
        tile = (pattern.rows or outputs) * (pattern.columns or inputs)
        return pruned_count(sparsity, size // tile) * tile
    if pattern.scope == "row":
        return outputs * pruned_count(sparsity, inputs)
    return pruned_count(sparsity, size)


def assert_sound(method, given, found):
    """Assert the properties of every method, pattern and input."""
    assert found.keep.dtype == torch.bool
    assert found.keep.shape == found.weight.shape == given.weight.shape
    assert found.weight.isfinite().all()
    assert (found.weight[~found.keep] == 0).all()
    count = expected_count(given.pattern, given.sparsity, given.weight.shape)
    assert int((~found.keep).sum()) == count
    assert given.pattern.violations(found.keep) == 0
    if isinstance(method, Scored):
        assert torch.equal(found.weight[found.keep], given.weight[found.keep])


def error(given, found):
    change = (found.weight - given.weight).double()
    return float(((change @ given.stats[Gram].full.double()) * change).sum())
