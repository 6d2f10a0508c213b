"""Rows split over ranks: a partition that respects tiles."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.models.layout import Linear
from prunekit.models.sequential.checks import Checks
from prunekit.patterns import parse
from prunekit.sparsify.row_sharding import (
    ShardedLinear,
    ShardedPattern,
    row_shards,
    shard_pattern,
)

LINEAR = Linear("block.up", "up", 8, 4)


@pytest.mark.parametrize("spelled", ["2:4", "block:2x2", "unstructured"])
@pytest.mark.parametrize("size", [2, 3])
def test_shards_are_a_partition_of_the_rows_at_tiles(spelled, size):
    shards = row_shards(parse(spelled), Ranks(0, size), 12, 8)
    assert shards is not None
    assert [row for shard in shards for row in range(12)[shard]] == [*range(12)]
    if spelled.startswith("block"):
        assert all(shard.start % 2 == 0 for shard in shards)


def test_rows_are_not_split_where_there_are_too_few_or_one_rank():
    assert row_shards(parse("2:4"), SINGLE, 12, 8) is None
    assert row_shards(parse("2:4"), Ranks(0, 4), 3, 8) is None
    assert row_shards(parse("block:6x2"), Ranks(0, 4), 12, 8) is None


def test_a_pattern_within_rows_is_its_own_and_one_across_rows_is_sharded():
    ranks = Ranks(0, 2)
    within = parse("2:4")
    assert shard_pattern(within, ranks, 8, 8) is within
    assert isinstance(shard_pattern(parse("row"), ranks, 8, 8), ShardedPattern)


def loaded(block):
    """What a linear reads of a loaded block."""
    return SimpleNamespace(module=block, checks=Checks())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_own_rows(rank):
    block = nn.ModuleDict({"up": nn.Linear(4, 8)})
    ranks = Ranks(rank, 2)
    sharded = ShardedLinear(LINEAR, [slice(0, 5), slice(5, 8)], ranks)
    expected = block["up"].weight[[slice(0, 5), slice(5, 8)][rank]]
    assert torch.equal(sharded.read(loaded(block)), expected)
    assert sharded.sharing is ranks
    _, rows = sharded.shard(parse("2:4"))
    assert (rows.start, rows.total) == (5 * rank, 8)


def test_without_shards_a_rank_has_all_rows():
    block = nn.ModuleDict({"up": nn.Linear(4, 8)})
    sharded = ShardedLinear(LINEAR, None, Ranks(1, 2))
    assert torch.equal(sharded.read(loaded(block)), block["up"].weight)
    assert sharded.sharing is SINGLE
    pattern = parse("2:4")
    assert sharded.shard(pattern) == (pattern, None)
    own = torch.ones(8, 4)
    assert sharded.gather(own) is own
