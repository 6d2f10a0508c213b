"""Units pruned while several processes train a model: DDP, and FSDP 2."""

import json

import pytest

TRAIN = """
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import prunekit
from prunekit.distributed.join import join
from tests.support.units import randomized_model

def whole(weight):
    weight = weight.detach()
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).clone()

def sharded(model, ranks):
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks.size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def closed_weights(model, keep):
    mlp, closed = model.model.layers[1].mlp, ~keep["model.layers.1.mlp.down_proj"]
    return whole(mlp.up_proj.weight)[closed], whole(mlp.down_proj.weight)[:, closed]

how, folder = arguments
ids = torch.randint(3, 96, (6, 9), generator=torch.Generator().manual_seed(4))
with join("cpu") as ranks:
    own = ids[ranks.shard(len(ids))]
    model = randomized_model("llama")
    neurons = prunekit.neurons(model)
    wrap = {"one": lambda *_: model, "ddp": lambda *_: DistributedDataParallel(model)}
    wrapper = wrap.get(how, sharded)(model, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = {"sparsity": 0.5, "end": 4, "every": 2, "regrow": 0.5, "regrow_every": 3}
    held = True
    with neurons.during(optimizer, "gradient", own, **schedule) as pruner:
        for _ in range(6):
            wrapper(own, labels=own).loss.backward()
            keep = neurons.keep
            before = closed_weights(model, keep)
            optimizer.step()
            optimizer.zero_grad()
            held &= all(map(torch.equal, before, closed_weights(model, keep)))
    found = {"kept": neurons.kept, "held": held, "done": pruner.done, "closed": neurons.closed}
    Path(folder, f"{ranks.rank}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def of_one(fork_server, tmp_path_factory):
    """The result of one process with all data."""
    folder = tmp_path_factory.mktemp("one")
    fork_server.start(folder, 1, TRAIN, "one", folder).succeed()
    return json.loads((folder / "0.json").read_text())


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_all_ranks_prune_the_units_that_one_process_with_all_data_does(
    how, of_one, fork_server, tmp_path
):
    fork_server.start(tmp_path, 2, TRAIN, how, tmp_path).succeed()
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == of_one
    assert of_one["held"]
    assert of_one["done"]
    assert of_one["closed"] == 64


CUT = """
import json
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import prunekit
from prunekit.distributed.join import join
from prunekit.errors import ConfigError
from tests.support.units import randomized_model

(folder,) = arguments
ids = torch.randint(3, 96, (6, 9), generator=torch.Generator().manual_seed(4))
with join("cpu") as ranks:
    own = ids[ranks.shard(len(ids))]
    model = randomized_model("llama")
    wrap = DistributedDataParallel if ranks.size > 1 else lambda model: model
    wrapper, neurons, losses = wrap(model), prunekit.neurons(model), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    def steps(count):
        for _ in range(count):
            loss = wrapper(own, labels=own).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            parts = ranks.all_gather_object(loss.item())
            losses.append(sum(parts) / len(parts))

    with neurons.during(optimizer, "gradient", own, sparsity=0.5, end=2):
        steps(3)
    kept = neurons.finalize(optimizer=optimizer).kept
    if ranks.size > 1:
        try:
            steps(1)
        except ConfigError as error:
            assert "DistributedDataParallel(wrapper.module)" in str(error)
        else:
            raise AssertionError
    wrapper = wrap(model)
    steps(3)
    Path(folder, f"{ranks.rank}.json").write_text(json.dumps({"kept": kept, "losses": losses}))
"""


def test_units_are_cut_under_ddp_and_training_goes_on_in_a_new_wrapper(fork_server, tmp_path):
    """Two processes have the units and the losses of one with all data."""
    found = {}
    for size in (1, 2):
        folder = tmp_path / str(size)
        fork_server.start(folder, size, CUT, folder).succeed()
        found[size] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    ((one,), both) = found[1], found[2]
    for each in both:
        assert each["kept"] == one["kept"]
        assert each["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert sum(map(len, one["kept"].values())) == 64


SCORE = """
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import prunekit
from prunekit.distributed.join import join
from prunekit.errors import ConfigError
from prunekit.structured.rankers import rankers
from tests.support.units import randomized_model

def scores(model, kind, name, own):
    gates = getattr(prunekit, kind)(model)
    found = gates.score(name, own, ranks=ranks)
    gates.detach()
    return found

with join("cpu") as ranks:
    ids = torch.randint(3, 96, (17, 9), generator=torch.Generator().manual_seed(4))
    own = ids[:6][ranks.shard(6)]
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks.size,))
    whole, model = randomized_model("llama"), randomized_model("llama")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    cases = [
        (name, kind)
        for name, ranker in rankers().items()
        for kind in ("heads", "neurons", "blocks", "hidden")
        if all(kind in part.kinds for part in ranker().components)
        and (name, kind) != ("leave-one-out", "hidden")  # of many coordinates
    ]
    for name, kind in cases:
        expected = scores(whole, kind, name, own)
        try:
            found = scores(model, kind, name, own)
        except ConfigError as error:
            assert name in ("llm-pruner", "parameter-gradient"), name
            assert "Take a ranker of activations, such as gradient" in str(error)
        else:
            for group, score in expected.items():
                torch.testing.assert_close(found[group], score, msg=f"{name} of {kind}")
    try:
        scores(model, "heads", "gradient", ids[ranks.shard(17)])
    except ConfigError as error:
        assert str(error).startswith("data: the processes have 1 and 2 batches"), error
    else:
        raise AssertionError
"""


def test_weights_sharded_by_fsdp_2_are_scored_as_whole_ones_or_refused(fork_server, tmp_path):
    fork_server.start(tmp_path, 2, SCORE).succeed()
