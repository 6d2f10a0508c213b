"""Gradual pruning under DDP: every process has the masks, as one process would."""

import torch
from safetensors.torch import load_file

SCRIPT = """
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import prunekit
from prunekit.distributed.join import join
from tests.support.architectures import tiny

with join("cpu") as ranks:
    model = tiny("llama")
    wrapped = DistributedDataParallel(model) if ranks.size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(1))
    settings = {"method": "wanda", "tokens": ids, "sparsity": 0.6, "initial": 0.3, "end": 6}
    pruner = prunekit.GradualPruner(
        wrapped, optimizer, every=3, regrow=0.2, regrow_every=2, **settings
    )
    own = ids[ranks.shard(len(ids))]
    for _ in range(7):
        wrapped(input_ids=own).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pruner.done, pruner.achieved
    named = {name: each.detach() for name, each in model.named_parameters()}
    save_file(named, Path(arguments[0], str(rank)))
"""


def test_processes_prune_and_regrow_as_one_does(fork_server, tmp_path):
    weights = {}
    for size in (1, 2):
        folder = tmp_path / str(size)
        fork_server.start(folder, size, SCRIPT, folder).succeed()
        weights[size] = [load_file(folder / str(rank)) for rank in range(size)]
    (one,), (first, second) = weights[1], weights[2]
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name] == 0, value == 0), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
