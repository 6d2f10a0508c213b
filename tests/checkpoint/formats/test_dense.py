"""Dense format: the weight itself."""

import torch

from prunekit.checkpoint.formats import format_named


def test_the_weight_is_stored_unchanged():
    weight = torch.randn(3, 5)
    dense = format_named("dense")
    assert dense.why_not_storable(weight) is None
    assert dense.compress(weight)["weight"] is weight


def test_a_wrong_shape_is_corrupt():
    parts = {"weight": torch.zeros(3, 5)}
    assert format_named("dense").find_corruption(parts, (3, 5)) is None
    problem = format_named("dense").find_corruption(parts, (5, 3))
    assert problem == "has shape [3, 5] instead of [5, 3]"
