"""Curves: allocations that meet the budget at the least total error."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import prunekit
from prunekit.allocations.curves import Curves, split_budget
from prunekit.methods.layer import Layer
from prunekit.patterns import parse
from prunekit.statistics import Gram, StageStatistics
from tests.support.allocations import allocate, law
from tests.support.checkpoints import planned, tensors, write

pytestmark = pytest.mark.usefixtures("no_page")


def gram_blocks(*loudness, spelled="unstructured"):
    """Return one single-layer block per number, the spread of its input scales."""
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
    """Layers use only the mix, with a total within half a step."""
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
    found = split_budget(curves, counts, grid, 0.5)
    assert sum(found.values()) == pytest.approx(1.5)
    # On the convex hull of b a grid step costs 7 / 4. c reaches 0.5 at cost 1, a at cost 3, …
    assert found == pytest.approx({"a": 0.4, "b": 0.6, "c": 0.5})


def test_larger_layers_count_for_more():
    found = split_budget({"a": [0, 1], "b": [0, 1]}, {"a": 300, "b": 100}, [0.4, 0.6], 0.5)
    assert found == pytest.approx({"a": 0.4 + 0.2 * 200 / 300, "b": 0.4})


def test_curves_leave_out_what_is_not_pruned():
    blocks = gram_blocks(0, 1)
    assert set(Curves().allocate({"1": 768}, lambda: iter(blocks), 0.5)) == {"1"}
