"""Sharding and assignment of work; a world of one returns its inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit.distributed.join import join
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError


@given(st.integers(0, 200), st.integers(1, 9), st.sampled_from([1, 2, 4, 8]))
def test_shards_are_a_partition_at_multiples_of_the_unit(total, size, unit):
    shards = Ranks(0, size).shards(total, unit)
    assert len(shards) == size
    assert [i for shard in shards for i in range(total)[shard]] == list(range(total))
    assert all(shard.start % unit == 0 for shard in shards)
    assert [Ranks(rank, size).shard(total, unit) for rank in range(size)] == shards
    lengths = [shard.stop - shard.start for shard in shards]
    assert max(lengths) - min(lengths) < 2 * unit


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 5))
def test_the_largest_load_is_within_four_thirds_of_the_optimum(works, size):
    """Largest first is Graham's LPT rule: at most 4/3 of the optimum (1969)."""
    owners = Ranks(0, size).assign_each(works)
    loads = [sum(w for w, o in zip(works, owners, strict=True) if o == r) for r in range(size)]
    assert max(loads) <= sum(works) / size + max(works) * (1 - 1 / size)


def test_work_goes_to_the_rank_with_the_smallest_load():
    ranks = Ranks(0, 3)
    assert [ranks.assign(work) for work in (5, 1, 1, 1, 9, 1)] == [0, 1, 2, 1, 2, 1]


@given(st.integers(1, 6), st.integers(0, 20))
def test_rounds_give_each_rank_one_piece_before_any_a_second(size, count):
    owners = Ranks(0, size).assign_rounds(1.0, count)
    assert len(owners) == count
    for start in range(0, count, size):
        round_ = owners[start : start + size]
        assert len(set(round_)) == len(round_)


def test_a_world_of_one_returns_its_inputs(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks, x = join("cpu"), torch.randn(3, 4)
    assert ranks is SINGLE
    assert ranks.is_main
    before = x.clone()
    ranks.all_reduce_sum(x, "statistics")
    ranks.broadcast(0, [x], "rows")
    assert torch.equal(x, before)
    assert ranks.all_gather_rows(x, [slice(0, 3)]) is x
    assert ranks.all_gather_object("a") == ["a"]
    assert ranks.run_on_main(lambda: 3) == 3
    assert ranks.local_device(torch.device("cpu")) == torch.device("cpu")
    ranks.require_same({"a": 1})
    assert not ranks.traffic


def test_a_single_gpu_is_refused_for_several_ranks():
    with pytest.raises(ConfigError, match=r'model\.device: "cuda:0" is one GPU, but 2 processes'):
        Ranks(0, 2).local_device(torch.device("cuda:0"))
