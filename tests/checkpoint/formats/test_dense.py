"""Dense format: the weight itself."""

import torch

from prunekit.checkpoint.formats import WeightLayout, format_named


def test_the_weight_is_stored_unchanged():
    weight = torch.randn(3, 5)
    dense = format_named("dense")
    assert dense.why_not_storable(weight) is None
    assert dense.compress(weight)["weight"] is weight


def test_a_wrong_shape_is_corrupt():
    parts = {"weight": torch.zeros(3, 5)}
    assert format_named("dense").find_corruption(parts, WeightLayout(3, 5, 15)) is None
    problem = format_named("dense").find_corruption(parts, WeightLayout(5, 3, 15))
    assert problem == "weight has shape [3, 5]; a weight of [5, 3] needs [5, 3]"
