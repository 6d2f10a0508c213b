"""How a sparsity budget is spread over layers."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import prunekit
from prunekit.allocations import allocations
from prunekit.allocations.curves import Curves, split
from prunekit.allocations.global_ import Global
from prunekit.allocations.owl import Owl
from prunekit.allocations.uniform import Uniform
from prunekit.errors import NumericsError
from prunekit.methods.layer import Layer
from prunekit.methods.magnitude import Magnitude
from prunekit.patterns import parse, pruned_count
from prunekit.statistics import ColumnEnergy, Gram, StageStatistics
from tests.support.checkpoints import planned, tensors, write

sparsities = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
seeds = st.integers(0, 1 << 30)
law = settings(deadline=None, max_examples=25)


def layer(name, weight, x=None):
    energy = ColumnEnergy(weight.shape[1])
    energy.update(torch.ones(1, weight.shape[1]) if x is None else x)
    return Layer(name, weight, StageStatistics([energy]), parse("unstructured", "layer"), 0.0)


def blocks_of(*shapes, seed=0, values=None):
    """Return blocks of layers named after their place; each shape is one block of two layers."""
    generator = torch.Generator().manual_seed(seed)

    def weight(outputs, inputs):
        if values:
            return torch.randint(-values, values + 1, (outputs, inputs), generator=generator) / 4
        return torch.randn(outputs, inputs, generator=generator)

    return [
        [layer(f"{i}.{j}", weight(outputs, inputs)) for j in range(2)]
        for i, (outputs, inputs) in enumerate(shapes)
    ]


def sizes(blocks):
    return {layer.name: layer.weight.numel() for block in blocks for layer in block}


def allocate(allocation, blocks, sparsity):
    return allocation.allocate(sizes(blocks), lambda: iter(blocks), sparsity)


def flat(blocks):
    return [layer for block in blocks for layer in block]


def test_the_allocations_are_all_here():
    assert set(allocations().values()) == {Curves, Global, Owl, Uniform}


# Uniform


def test_uniform_gives_all_the_same_and_looks_at_nothing():
    found = Uniform().allocate({"a": 3, "b": 9}, lambda: pytest.fail("surveyed"), 0.3)
    assert found == {"a": 0.3, "b": 0.3}
    assert not Uniform.surveys
    assert not Uniform.needs


# OWL


def owl_by_the_formula(blocks, sparsity, outlier, spread):
    """Say in float64 what eq. 2 and 3 say, with the mean weighted by the size of the blocks."""
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
    apart = high - low or 1.0  # blocks that are all alike are pruned alike
    scaled = [(share - low) / apart * 2 * spread for share in shares]
    mean = sum(s * n for s, n in zip(scaled, counts, strict=True)) / sum(counts)
    return [1 - (s - mean + 1 - sparsity) for s in scaled]


def with_outliers(*shares):
    """Return blocks of 10 × 10 weights of which these many are outliers."""
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


# Global


def masks(blocks, found):
    """Return what stays when each layer is pruned by magnitude to the sparsity that was found."""
    return {
        layer.name: Magnitude()
        .prune(Layer(layer.name, layer.weight, layer.stats, layer.pattern, found[layer.name]))
        .keep
        for layer in flat(blocks)
    }


def by_one_sort(blocks, sparsity):
    """Say what stays when all magnitudes are sorted at once; of equals the earlier stay."""
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


# Curves


def gram_blocks(*loudness, spelled="unstructured"):
    """Return a block of one layer for each number: how much its inputs differ in loudness."""
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for number, spread in enumerate(loudness):
        weight = torch.randn(16, 48, generator=generator)
        x = torch.randn(300, 48, generator=generator)
        gram = Gram(48)
        gram.update(x * (spread * torch.randn(48, generator=generator)).exp())
        pattern = parse(spelled, "layer")
        blocks.append([Layer(f"{number}", weight, StageStatistics([gram]), pattern, 0.0)])
    return blocks


@law
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.floats(0, 1))
def test_curves_meet_the_budget_within_their_spread(loudness, sparsity):
    blocks = gram_blocks(*loudness)
    found = allocate(Curves(), blocks, sparsity)
    assert sum(found.values()) / len(found) == pytest.approx(sparsity, abs=1e-9)
    assert all(abs(value - sparsity) <= 0.1 + 1e-9 for value in found.values())
    assert all(0 <= value <= 1 for value in found.values())


def test_curves_take_more_where_few_inputs_matter():
    found = allocate(Curves(), gram_blocks(0, 2), 0.5)
    assert found["1"] > 0.5 > found["0"]


@pytest.mark.parametrize(
    ("spelled", "mix"),
    [("4:8", (2, 3, 4, 5, 6)), ("2:4", (1, 2, 3)), ("1:4", (1, 2, 3)), ("7:8", (5, 6, 7))],
)
def test_curves_mix_n_of_m(spelled, mix):
    """Every layer gets one of the mix, and all together what was asked, to half a step of one."""
    pattern = parse(spelled)
    found = allocate(Curves(), gram_blocks(0, 3, 0, 3, spelled=spelled), pattern.sparsity)
    kept = [pattern.m * (1 - value) for value in found.values()]
    assert kept == pytest.approx([round(n) for n in kept])
    assert {round(n) for n in kept} <= set(mix)
    assert abs(sum(kept) - 4 * pattern.n) <= 0.5 + 1e-9
    assert kept[1] <= kept[0]


def test_a_mix_is_pruned_written_and_counted(tmp_path):
    folder = write(tmp_path / "m", intermediate_size=96)
    prune = {"method": "sparsegpt", "pattern": "2:4", "allocation": "curves"}
    *_, finish = prunekit.run(planned(folder, tmp_path / "out", prune=prune))
    report = finish.values
    mixed = {layer.get("pattern", "2:4") for layer in report["layers"]}
    assert len(mixed) > 1
    assert report["sparsity"]["violations"] == 0
    assert report["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.06)
    for layer in report["layers"]:
        n = int(layer.get("pattern", "2:4")[0])
        assert layer["sparsity"] == pytest.approx(1 - n / 4)
        groups = tensors(tmp_path / "out")[layer["tensor"]].view(-1, 4)
        assert ((groups != 0).sum(1) == n).all()


def test_the_split_of_a_budget_is_the_best_there_is():
    curves = {"a": [0, 1, 3, 6, 10], "b": [0, 4, 5, 6, 7], "c": [0, 0.5, 1, 8, 9]}
    counts = dict.fromkeys(curves, 100)
    grid = [0.3, 0.4, 0.5, 0.6, 0.7]
    found = split(curves, counts, grid, 0.5)
    assert sum(found.values()) == pytest.approx(1.5)
    # Hull of b: it costs 7 / 4 a point of the grid. c goes to 0.5 for 1, a to 0.5 for 3, …
    assert found == pytest.approx({"a": 0.4, "b": 0.6, "c": 0.5})


def test_larger_layers_count_for_more():
    found = split({"a": [0, 1], "b": [0, 1]}, {"a": 300, "b": 100}, [0.4, 0.6], 0.5)
    assert found == pytest.approx({"a": 0.4 + 0.2 * 200 / 300, "b": 0.4})


def test_curves_leave_out_what_is_not_pruned():
    blocks = gram_blocks(0, 1)
    assert set(Curves().allocate({"1": 768}, lambda: iter(blocks), 0.5)) == {"1"}
