"""Ranks of a process group that another library has started."""

import torch
import torch.distributed as dist

from prunekit.distributed.process_group import ProcessGroupRanks, current_ranks
from prunekit.distributed.ranks import SINGLE


def test_one_process_is_a_single_rank_with_and_without_a_group(tmp_path):
    assert current_ranks() is SINGLE
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert current_ranks() is SINGLE
        ranks, total = ProcessGroupRanks(0, 1), torch.ones(2)
        assert ranks.all_gather_object({"a": 1}) == [{"a": 1}]
        ranks.all_reduce_sum(total, "scores")
        assert total.tolist() == [1, 1]
    finally:
        dist.destroy_process_group()


SUMS = """
import os
from pathlib import Path

import torch
import torch.distributed as dist

from prunekit.distributed.process_group import current_ranks

dist.init_process_group("gloo")
ranks, total = current_ranks(), torch.full((2,), float(rank + 1))
ranks.all_reduce_sum(total, "scores")
found = [ranks.rank == rank, ranks.size, ranks.all_gather_object(rank), total.tolist()]
Path(arguments[0], str(rank)).write_text(str(found))
dist.destroy_process_group()
"""


def test_ranks_of_a_launcher_add_up_and_know_each_other(fork_server, tmp_path):
    fork_server.start(tmp_path, 2, SUMS, tmp_path).succeed()
    for rank in "01":
        assert (tmp_path / rank).read_text() == str([True, 2, [0, 1], [3.0, 3.0]])
