"""A layer knows its whole size, and sums over the ranks that share it."""

import torch

from prunekit.distributed.ranks import Ranks
from prunekit.methods.layer import Layer, RowShard
from prunekit.patterns import parse
from prunekit.statistics import StageStatistics


class Doubling(Ranks):
    """Two ranks with the same numbers."""

    def __init__(self):
        super().__init__(0, 2)
        self.purposes = []

    def all_reduce_sum(self, tensor, what):
        tensor.mul_(2)
        self.purposes.append(what)


def layer(rows=None):
    return Layer("layer", torch.ones(3, 4), StageStatistics([]), parse("2:4"), 0.5, rows)


def test_a_whole_layer_has_its_own_rows_and_sums_nothing():
    counts = torch.tensor([1, 2])
    layer().all_reduce_sum(counts)
    assert layer().outputs == 3
    assert counts.tolist() == [1, 2]


def test_a_shard_knows_the_rows_of_all_ranks_and_sums_over_them():
    ranks, counts = Doubling(), torch.tensor([1, 2])
    shard = layer(RowShard(3, 6, ranks))
    shard.all_reduce_sum(counts)
    assert shard.outputs == 6
    assert counts.tolist() == [2, 4]
    assert ranks.purposes == ["thresholds"]
