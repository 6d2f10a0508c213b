"""Global: one magnitude threshold for the whole model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit.allocations.global_ import Global
from prunekit.methods.layer import Layer
from prunekit.methods.magnitude import Magnitude
from prunekit.patterns import pruned_count
from tests.support.allocations import allocate, blocks_of, flat, law, layer, seeds

sparsities = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


def masks(blocks, found):
    """Return keep masks of magnitude pruning at the allocated sparsities."""
    return {
        layer.name: Magnitude()
        .prune(Layer(layer.name, layer.weight, layer.stats, layer.pattern, found[layer.name]))
        .keep
        for layer in flat(blocks)
    }


def by_one_sort(blocks, sparsity):
    """Return keep masks from one stable sort; ties keep the earlier."""
    layers = flat(blocks)
    everything = torch.cat([layer.weight.abs().flatten() for layer in layers])
    order = everything.sort(descending=True, stable=True).indices
    keep = torch.zeros(len(everything), dtype=torch.bool)
    keep[order[: len(everything) - pruned_count(sparsity, len(everything))]] = True
    parts = keep.split([layer.weight.numel() for layer in layers])
    return {
        layer.name: part.view_as(layer.weight) for layer, part in zip(layers, parts, strict=True)
    }


def assert_global(blocks, sparsity):
    found = masks(blocks, allocate(Global(), blocks, sparsity))
    expected = by_one_sort(blocks, sparsity)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    pruned = sum(int((~keep).sum()) for keep in found.values())
    assert pruned == pruned_count(sparsity, sum(keep.numel() for keep in found.values()))


@law
@given(seeds, sparsities, st.sampled_from([None, 1, 3, 40]))
def test_global_is_one_sort_of_all_magnitudes(seed, sparsity, values):
    assert_global(blocks_of((5, 7), (1, 1), (3, 16), seed=seed, values=values), sparsity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_global_takes_weights_of_any_stored_type(dtype, sparsity):
    blocks = [
        [layer(old.name, old.weight.to(dtype).float()) for old in block]
        for block in blocks_of((20, 30), (40, 16))
    ]
    assert_global(blocks, sparsity)


def test_the_threshold_of_global_is_the_kth_magnitude():
    blocks = blocks_of((9, 14), (6, 31))
    everything = torch.cat([layer.weight.abs().flatten() for layer in flat(blocks)])
    threshold = everything.kthvalue(200).values
    found = allocate(Global(), blocks, 200 / len(everything))
    for each in flat(blocks):
        below = int((each.weight.abs() <= threshold).sum())
        assert found[each.name] * each.weight.numel() == pytest.approx(below)


def test_magnitudes_that_differ_in_the_last_bit_only_are_told_apart():
    step = torch.finfo(torch.float32).eps
    rising = 1 + step * torch.arange(16).view(1, 16)
    blocks = [[layer("low", rising)], [layer("high", rising + 16 * step)]]
    assert allocate(Global(), blocks, 0.5) == {"low": 1.0, "high": 0.0}


def test_of_equal_magnitudes_those_in_earlier_layers_stay():
    blocks = [[layer(name, torch.full((2, 5), -0.5))] for name in "abc"]
    assert allocate(Global(), blocks, 0.5) == {"a": 0.0, "b": 0.5, "c": 1.0}


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_global_of_zeros_is_exact(sparsity):
    zeros = torch.zeros(2, 5)
    zeros[0] = -0.0
    blocks = [[layer("a", zeros)], [layer("b", zeros)]]
    assert_global(blocks, sparsity)


def test_global_leaves_out_what_is_not_pruned():
    blocks = [[layer("a", torch.ones(1, 4)), layer("skipped", torch.zeros(1, 4))]]
    assert Global().allocate({"a": 4}, lambda: iter(blocks), 0.25) == {"a": 0.25}


def test_global_stands_for_magnitude_only_and_needs_no_tokens():
    assert Global.methods == {"magnitude"}
    assert not Global.needs
    assert Global.surveys
