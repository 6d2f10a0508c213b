"""Weights sharded over ranks by FSDP 2 are trained and pruned as those of one process."""

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_training import TRAIN
from tests.support.adapters import PEFT_WARNS

SHARDED = """
from functools import partial
from prunekit.training.lora import add_adapter, merge_adapters
from prunekit.training.sharding import Sharding

def gated(model):
    heads = prunekit.heads(model)
    heads.prune(heads.score("magnitude"), 0.5)
    for gate in heads.gates.values():
        gate.value.requires_grad_()
    return model, [heads], None

def kept(model):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:, ::2] = 0
    return model, [], masked(model)

def masked(model):
    @contextmanager
    def during(optimizer):
        with prunekit.training.keep_masks(model, optimizer):
            yield None
    return during

def pruned(model):
    schedule = {"sparsity": 0.5, "start": 2, "end": 9, "every": 3, "regrow": 0.3, "regrow_every": 4}
    return model, [], lambda optimizer: prunekit.GradualPruner(
        model, optimizer, method="wanda", tokens=ids, **schedule)

def taught(model):
    return model, [], lambda optimizer: prunekit.GradualPruner(
        model, optimizer, sparsity=0.5, end=4)

def adapted(model):
    _, _, during = kept(model)
    made = add_adapter(model, 2)
    prunekit.training.mask_adapters(made)
    return made, [], None

def units(model):
    neurons = prunekit.neurons(model)
    schedule = {"sparsity": 0.5, "end": 9, "every": 3, "regrow": 0.5, "regrow_every": 4}
    return model, [neurons], lambda optimizer: neurons.during(
        optimizer, "gradient", ids[ranks.shard(12)], ranks=ranks, **schedule)

with join("cpu") as ranks:
    for case in (gated, kept, pruned, taught, adapted, units):
        model = new_model()
        kind = type(model)
        trained, gates, during = case(model)
        distill = Distill(map="closest", end=9) if case is taught else None
        update = {"sharded": ranks.is_distributed, "checkpoint_activations": ranks.is_distributed}
        options = {"during": during, "distill": distill, "ranks": ranks}
        steps = [*recover(trained, batches, ids[:3], settings.model_copy(update=update), gates,
                          **options)]
        if case is adapted:
            merge_adapters(trained)
        if ranks.is_main:
            numbers = [[each.loss, each.held_out, each.sparsity, each.achieved,
                        *each.distillation.values()] for each in steps]
            Path(arguments[0], f"{case.__name__}.json").write_text(json.dumps(numbers[1:]))
            values = {str(i): v.value for each in gates for i, v in enumerate(each.gates.values())}
            values |= {f"keep {name}": keep for each in gates for name, keep in each.keep.items()}
            named = dict(model.named_parameters()) | values
            save_file({name: each.detach() for name, each in named.items()},
                      Path(arguments[0], case.__name__))
        for each in gates:
            each.detach()
        assert type(model) is kind
"""


@pytest.fixture(scope="module")
def trained(fork_server, tmp_path_factory):
    """Return the folder with the numbers of each step and the weights of some ranks."""

    @cache
    def of(size):
        folder = tmp_path_factory.mktemp("sharded")
        fork_server.start(folder, size, TRAIN + SHARDED, folder).succeed()
        return folder

    return of


@pytest.mark.filterwarnings(*PEFT_WARNS)
@pytest.mark.parametrize("case", ["gated", "kept", "pruned", "taught", "adapted", "units"])
def test_sharded_weights_are_trained_as_those_of_one_process(trained, case):
    """Losses, zeros and units, with blocks that are run again for their gradients."""
    steps, expected = (json.loads((trained(n) / f"{case}.json").read_text()) for n in (2, 1))
    weights, exact = (load_file(trained(n) / case) for n in (2, 1))
    for number, (step, truth) in enumerate(zip(steps, expected, strict=True)):
        assert step[:2] == pytest.approx(truth[:2], rel=1e-5), number
        assert step[2:4] == truth[2:4]
        assert step[4:] == pytest.approx(truth[4:], rel=1e-3, abs=1e-6), number
    assert weights.keys() == exact.keys()
    for name, weight in weights.items():
        assert torch.equal(weight == 0, exact[name] == 0), name
        torch.testing.assert_close(weight, exact[name], rtol=1e-3, atol=2e-4)
    assert torch.equal(weights["unused"], torch.ones(3))
