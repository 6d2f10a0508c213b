"""Compressed weights are restored exactly; invalid entries of a config are refused."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.checkpoint.compressed import (
    compress_weight,
    compressed_weights,
    expand_weight,
    storage_config,
)
from prunekit.checkpoint.formats import WeightLayout, format_named
from prunekit.errors import CheckpointError
from tests.support.corruptions import CASES, spoiled
from tests.support.formats import DTYPES, weight_for


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["2:4", "bitmask", "dense"]),
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_a_compressed_weight_is_restored(kind, outputs, groups, dtype, transposed, seed):
    torch.manual_seed(seed)
    weight = weight_for(kind, outputs, 4 * groups, dtype)
    weight = weight.T.contiguous() if transposed else weight
    tensors, layout = compress_weight(format_named(kind), "a.weight", weight, transposed=transposed)
    assert torch.equal(expand_weight(format_named(kind), "a.weight", tensors, layout), weight)
    if layout:
        assert layout.shape == tuple(weight.shape)
        assert tensors["a.weight"].shape != weight.shape
        parts = {name.removeprefix("a."): tensor for name, tensor in tensors.items()}
        assert format_named(kind).find_corruption(parts, layout) is None


def test_the_config_lists_the_layouts_that_it_was_made_of():
    kind, layouts = (
        format_named("bitmask"),
        {"b": WeightLayout(2, 8, 5), "a": WeightLayout(4, 4, 3)},
    )
    found = compressed_weights(Path("m"), storage_config(kind, layouts))
    assert {name: weight.layout for name, weight in found.items()} == {
        f"{name}.weight": layout for name, layout in layouts.items()
    }
    assert found["a.weight"].parts == {part: f"a.{part}" for part in kind.parts}


@pytest.mark.parametrize(
    "storage",
    [
        {},
        {"format": "4:2", "linears": {}},
        {"format": "2:4", "linears": {"a": [2, 8]}},
        {"format": "2:4", "linears": {"a": [2, 8, -1]}},
        {"format": "2:4", "linears": {"a": [2, True, 8]}},
        {"format": "2:4", "linears": [1]},
    ],
)
def test_an_invalid_entry_is_refused(storage):
    with pytest.raises(CheckpointError, match=r"m/config\.json: its quantization_config is not"):
        compressed_weights(Path("m"), storage)


@pytest.mark.parametrize(("kind", "corruption"), CASES, ids=str)
def test_corrupt_parts_are_not_expanded(kind, corruption):
    torch.manual_seed(0)
    weight = weight_for(kind, 6, 20, torch.float32)
    tensors, layout = compress_weight(format_named(kind), "a.weight", weight, transposed=False)
    with pytest.raises(CheckpointError, match=rf"^a\.weight: .*({corruption.message})"):
        expand_weight(format_named(kind), "a.weight", spoiled(tensors, corruption, "a."), layout)


def test_a_dense_weight_that_is_missing_is_named():
    with pytest.raises(CheckpointError, match=r"^a\.weight: it is missing"):
        expand_weight(format_named("2:4"), "a.weight", {}, None)
