"""OWL: the published formula and the budget."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from prunekit.allocations.owl import Owl
from prunekit.errors import NumericsError
from prunekit.statistics import ColumnEnergy
from tests.support.allocations import allocate, blocks_of, law, layer, seeds, sizes


def owl_by_the_formula(blocks, sparsity, outlier, spread):
    """Compute eq. 2 and 3 in float64, mean weighted by block size."""
    shares, counts = [], []
    for block in blocks:
        scores = torch.cat(
            [
                (
                    layer.weight.double().abs() * layer.stats[ColumnEnergy].total.double().sqrt()
                ).flatten()
                for layer in block
            ]
        )
        shares.append(float((scores > outlier * scores.mean()).double().mean()))
        counts.append(scores.numel())
    low, high = min(shares), max(shares)
    apart = high - low or 1.0  # identical blocks get equal sparsity
    scaled = [(share - low) / apart * 2 * spread for share in shares]
    mean = sum(s * n for s, n in zip(scaled, counts, strict=True)) / sum(counts)
    return [1 - (s - mean + 1 - sparsity) for s in scaled]


def with_outliers(*shares):
    """Return 10 × 10 blocks, each with the given number of outliers."""
    blocks = []
    for number, share in enumerate(shares):
        weight = torch.ones(10, 10)
        weight.view(-1)[:share] = 30.0
        blocks.append([layer(str(number), weight)])
    return blocks


def test_owl_on_layers_made_by_hand():
    blocks = with_outliers(0, 2, 4)
    found = allocate(Owl(), blocks, 0.6)
    assert found == pytest.approx({"0": 0.68, "1": 0.6, "2": 0.52})


@law
@given(seeds, st.floats(1.5, 4), st.floats(0.01, 0.15), st.floats(0.35, 0.65))
@example(0, 50.0, 0.1, 0.5)  # no outlier anywhere
def test_owl_is_its_formula_and_meets_the_budget(seed, outlier, spread, sparsity):
    blocks = blocks_of((6, 20), (11, 13), (8, 40), seed=seed)
    allocation = Owl(outlier=outlier, spread=spread)
    found = allocate(allocation, blocks, sparsity)
    per_block = owl_by_the_formula(blocks, sparsity, outlier, spread)
    for number, expected in enumerate(per_block):
        assert found[f"{number}.0"] == found[f"{number}.1"] == pytest.approx(expected, abs=1e-9)
    count = sizes(blocks)
    met = sum(found[name] * size for name, size in count.items()) / sum(count.values())
    assert met == pytest.approx(sparsity, abs=1e-12)
    assert all(abs(value - sparsity) <= 2 * spread + 1e-12 for value in found.values())


def test_owl_weighs_activations_and_not_weights_alone():
    loud = torch.ones(1, 20)
    loud[0, 3] = 100.0
    blocks = [[layer("calm", torch.ones(5, 20))], [layer("loud", torch.ones(5, 20), loud)]]
    found = allocate(Owl(), blocks, 0.5)
    assert found["loud"] < 0.5 < found["calm"]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 1.0])
def test_owl_of_blocks_that_are_alike_is_uniform(sparsity):
    found = allocate(Owl(), with_outliers(3, 3, 3, 3, 3, 3, 3), sparsity)
    assert set(found.values()) == {sparsity}


def test_owl_of_weights_that_are_all_zero_is_uniform():
    blocks = [[layer("a", torch.zeros(3, 4))], [layer("b", torch.zeros(3, 4))]]
    assert allocate(Owl(), blocks, 0.5) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(("sparsity", "spread"), [(0.05, 0.08), (0.95, 0.08), (0.5, 0.45)])
def test_owl_refuses_a_spread_that_leaves_zero_to_one(sparsity, spread):
    blocks = with_outliers(0, 1, 8)
    with pytest.raises(
        NumericsError, match=rf"sparsity {sparsity} and spread {spread} .*lower the"
    ):
        allocate(Owl(spread=spread), blocks, sparsity)


def test_owl_leaves_out_what_is_not_pruned():
    blocks = with_outliers(0, 4, 9)
    known = {"0": 100, "1": 100}
    found = Owl().allocate(known, lambda: iter(blocks), 0.5)
    assert found == pytest.approx({"0": 0.58, "1": 0.42})


@pytest.mark.parametrize(
    "wrong", [{"outlier": 1}, {"spread": 0}, {"spread": 0.5}, {"lambda": 0.1}], ids=str
)
def test_owl_refuses_settings_that_make_no_sense(wrong):
    with pytest.raises(ValidationError):
        Owl(**wrong)
