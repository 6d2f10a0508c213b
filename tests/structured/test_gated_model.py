"""Sums over the batches of several ranks."""

import torch

from prunekit.structured.gated_model import GatedModel


class TwoRanks:
    """Two ranks, of which the other holds twice this rank's values."""

    def all_reduce_sum(self, tensor, _):
        tensor.mul_(3)

    def all_gather_object(self, value):
        return [value, {name: 2 * number for name, number in value.items()}]


def test_sums_and_counts_are_those_of_all_ranks():
    gated = GatedModel(None, [], {}, [], TwoRanks())
    sums = {"a": torch.ones(2), "b": torch.full((1,), 2.0)}
    gated.all_reduce_sums(sums.values())
    assert sums["a"].tolist() == [3, 3]
    assert sums["b"].tolist() == [6]
    assert gated.all_reduce_counts({"a": 1.0, "b": 4}) == {"a": 3, "b": 12}
