"""Formats are found by name; a layout survives the round trip through JSON."""

import json

import pytest
import torch

from prunekit.checkpoint.formats import WeightLayout, format_named, formats
from prunekit.errors import ConfigError


def test_names():
    assert sorted(formats()) == ["2:4", "bitmask", "dense"]
    with pytest.raises(ConfigError, match=r'"4:2" is not a format\. Choose: 2:4, bitmask, dense'):
        format_named("4:2")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layout_is_restored_from_its_dump(transposed):
    layout = WeightLayout(4, 8, 16, transposed=transposed)
    assert WeightLayout(*json.loads(json.dumps(layout.dump()))) == layout
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
    assert format_named(kind).wrong_dtype(parts) is None


@pytest.mark.parametrize("kind", ["2:4", "bitmask", "dense"])
def test_a_product_is_that_of_the_expanded_weight(kind):
    torch.manual_seed(0)
    weight = torch.randn(6, 8) * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(2)
    x = torch.randn(5, 8)
    parts = format_named(kind).compress(weight)
    assert torch.equal(format_named(kind).expand(parts, 8), weight)
    exact = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(format_named(kind).multiply(x, parts), exact)
