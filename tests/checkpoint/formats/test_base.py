"""Formats are found by name; a layout survives the round trip through JSON."""

import json
import re

import pytest
import torch

from prunekit.checkpoint.formats import WeightLayout, format_named, formats
from prunekit.errors import CheckpointError, ConfigError
from tests.support.corruptions import CASES, spoiled
from tests.support.formats import weight_for


def test_names():
    assert sorted(formats()) == ["2:4", "2:4-int8", "bitmask", "dense"]
    with pytest.raises(
        ConfigError, match=r'"4:2" is not a format\. Choose: 2:4, 2:4-int8, bitmask, dense'
    ):
        format_named("4:2")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layout_is_restored_from_its_dump(transposed):
    layout = WeightLayout(4, 8, 16, transposed=transposed)
    assert WeightLayout.load(json.loads(json.dumps(layout.dump())), "a") == layout
    assert layout.shape == ((8, 4) if transposed else (4, 8))


@pytest.mark.parametrize("kind", ["2:4", "bitmask", "dense"])
def test_empty_parts_are_those_of_a_compressed_weight(kind):
    weight = torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0, 3.0, 4.0, 0.0]]).bfloat16().repeat(4, 1)
    parts = format_named(kind).compress(weight)
    layout = WeightLayout(4, 8, parts["weight"].numel())
    empty = format_named(kind).empty(layout, weight.dtype)
    assert {name: (part.shape, part.dtype) for name, part in empty.items()} == {
        name: (part.shape, part.dtype) for name, part in parts.items()
    }
    assert format_named(kind).find_corruption(parts, layout) is None


@pytest.mark.parametrize("kind", ["2:4", "bitmask", "dense"])
def test_a_product_is_that_of_the_expanded_weight(kind):
    torch.manual_seed(0)
    weight = torch.randn(6, 8) * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(2)
    x = torch.randn(5, 8)
    parts = format_named(kind).compress(weight)
    assert torch.equal(format_named(kind).expand(parts, 8), weight)
    exact = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(format_named(kind).multiply(x, parts), exact)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        "4, 8, 16",
        [],
        [4, 8],
        [4, 8, 16, True, 1],
        [4, 8, 16, 1],
        [4, 8, 16, None],
        ["4", 8, 16],
        [4.0, 8, 16],
        [True, 8, 4],
        [-4, -8, 16],
        [4, 8, -1],
        [4, 8, 33],
        [0, 2**200, 0],
        [2**40, 2**40, 16],
        [[4], 8, 16],
    ],
    ids=str,
)
def test_a_list_that_is_no_layout_is_refused(entry):
    with pytest.raises(CheckpointError, match=r"a: .* is not the layout of a compressed weight: "):
        WeightLayout.load(entry, "a")


@pytest.mark.parametrize(("kind", "corruption"), CASES, ids=str)
def test_corrupt_parts_are_found(kind, corruption):
    torch.manual_seed(0)
    weight = weight_for(kind, 6, 20, torch.float32)
    parts = format_named(kind).compress(weight)
    layout = WeightLayout(6, 20, parts["weight"].numel())
    assert format_named(kind).find_corruption(parts, layout) is None
    problem = format_named(kind).find_corruption(spoiled(parts, corruption), layout)
    assert re.search(corruption.message, problem or "")


@pytest.mark.parametrize("kind", ["2:4", "bitmask"])
def test_headers_say_whether_parts_fit_a_layout(kind):
    parts = format_named(kind).compress(weight_for(kind, 6, 20, torch.float32))
    headers = {name: part.to("meta") for name, part in parts.items()}
    count = parts["weight"].numel()
    assert format_named(kind).find_mismatch(headers, WeightLayout(6, 20, count)) is None
    for layout in (WeightLayout(6, 28, count), WeightLayout(2**50, 8, 0), WeightLayout(0, 20, 0)):
        assert format_named(kind).find_mismatch(headers, layout)
    assert format_named(kind).find_corruption(headers, WeightLayout(6, 20, count)) is None


def test_values_of_another_number_than_listed_are_found():
    parts = format_named("2:4").compress(weight_for("2:4", 6, 20, torch.float32))
    problem = format_named("2:4").find_corruption(parts, WeightLayout(6, 20, 59))
    assert problem == "there are 60 values instead of 59"


def test_columns_that_form_no_groups_are_found():
    parts = {"weight": torch.ones(2, 3), "keep": torch.full((2, 1), 0b110011).byte()}
    problem = format_named("2:4").find_corruption(parts, WeightLayout(2, 6, 6))
    assert problem == "6 columns are no groups of four"
