"""Sharding without several processes: refusals, and failures that are named."""

from types import SimpleNamespace

import pytest
import torch

from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError, RankError
from prunekit.training.sharding import Sharding, _failures_named, blocks_of, whole_weights
from tests.support.architectures import tiny


def test_one_process_has_nothing_to_shard():
    with pytest.raises(ConfigError, match=r"one process has all weights\. Start several"):
        Sharding(tiny("llama"), SINGLE)


def test_a_model_that_is_sharded_already_is_refused():
    model = tiny("llama")
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks them
    with pytest.raises(ConfigError, match="sharded already"):
        Sharding(model, Ranks(0, 2))


def test_whole_weights_are_left_as_they_are():
    model = tiny("llama")
    before = [*model.parameters()]
    with whole_weights(model):
        before[0].data.zero_()
    assert all(one is two for one, two in zip(before, model.parameters(), strict=True))
    assert not bool(before[0].any())


def test_the_blocks_of_all_stacks_are_found():
    model = tiny("t5")
    assert blocks_of(model) == [*model.encoder.block, *model.decoder.block]


def test_a_failed_exchange_names_the_rank_and_other_errors_remain():
    waited, failures = [], ["rank 1 died", ""]
    ranks = Ranks(0, 2)
    ranks.heartbeat = SimpleNamespace(
        failed_rank=lambda: waited.append(1), failure=lambda _: failures.pop(0)
    )
    with pytest.raises(RankError, match="rank 1 died"), _failures_named(ranks):
        raise RuntimeError("connection closed")
    with pytest.raises(torch.OutOfMemoryError), _failures_named(ranks):
        raise torch.OutOfMemoryError("out of memory")
    assert len(waited) == 2
    with pytest.raises(RuntimeError, match="alone"), _failures_named(SINGLE):
        raise RuntimeError("alone")
