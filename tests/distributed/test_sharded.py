"""Weights sharded over ranks by FSDP 2 are trained and pruned as those of one process."""

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import configs
from tests.distributed.test_training import TRAIN
from tests.support import checkpoints
from tests.support.adapters import PEFT_WARNS

SHARDED = """
from prunekit.training.lora import add_adapter, merge_adapters

def pruned(model):
    schedule = {"sparsity": 0.5, "start": 1, "end": 5, "every": 2, "regrow": 0.3, "regrow_every": 2}
    return model, lambda optimizer: prunekit.GradualPruner(
        model, optimizer, method="wanda", tokens=ids, **schedule)

def taught(model):
    return model, lambda optimizer: prunekit.GradualPruner(
        model, optimizer, sparsity=0.5, end=4)

def adapted(model):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:, ::2] = 0
    made = add_adapter(model, 2)
    prunekit.training.mask_adapters(made)
    return made, None

with join("cpu") as ranks:
    for case in (pruned, taught, adapted):
        model = new_model()
        kind = type(model)
        trained, during = case(model)
        distill = Distill(map="closest", end=5) if case is taught else None
        update = {"sharded": ranks.is_distributed, "checkpoint_activations": ranks.is_distributed}
        update |= {"steps": 7, "every": 2}
        options = {"during": during, "distill": distill, "ranks": ranks}
        steps = [*recover(trained, batches, ids[:3], settings.model_copy(update=update),
                          **options)]
        if case is adapted:
            merge_adapters(trained)
        if ranks.is_main:
            numbers = [[each.loss, each.held_out, each.sparsity, each.achieved,
                        *each.distillation.values()] for each in steps]
            Path(arguments[0], f"{case.__name__}.json").write_text(json.dumps(numbers[1:]))
            save_file({name: each.detach() for name, each in model.named_parameters()},
                      Path(arguments[0], case.__name__))
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
@pytest.mark.parametrize("case", ["pruned", "taught", "adapted"])
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


TABLE = {"steps": 6, "batch": 3, "held_out": 2, "every": 3, "rate": 1e-3, "save_every": 2}
PRUNES = {
    "zeros": {"method": "magnitude", "pattern": "2:4"},
    "units": {"method": "gradient", "pattern": "neurons", "sparsity": 0.5, "end": 4, "every": 2},
}
STOPPED = """
from pathlib import Path
from prunekit.config.load import load_config
from prunekit.distributed.join import join
from prunekit.errors import StoppedError
from prunekit.runs import jobs

with join("cpu") as ranks:
    for path in arguments:
        made, reached = jobs.plan(load_config(path), ranks), []
        try:
            for record in jobs.run(made, stop=lambda: bool(reached)):
                if path.endswith("stopped.toml") and record.values.get("done") == 3:
                    reached.append(record)
            continue
        except StoppedError:
            pass
        states = sorted(each.name for each in Path(made.config.output.path).glob("training-*"))
        assert states == [f"training-state-0.{part}-of-2.safetensors" for part in (0, 1)], states
        names = [record.name for record in jobs.run(made, resume=True)]
        assert "continues after step 2" in names, names
"""


def test_sharded_runs_write_the_zeros_and_units_of_one_process_and_resume(fork_server, tmp_path):
    model = checkpoints.write(tmp_path / "llama", num_hidden_layers=1)

    def files(*names, sharded):
        found = []
        for name in names:
            found.append(tmp_path / f"{name}.toml")
            prune, train = PRUNES[name.split("-")[0]], TABLE | {"sharded": sharded}
            output = found[-1].with_suffix("")
            configs.write(found[-1], model, output, prune=prune, train=train, evaluate=None)
        return found

    fork_server.start(tmp_path / "1", 1, STOPPED, *files("zeros", "units", sharded=False)).succeed()
    several = [f"{name}-{kind}" for name in PRUNES for kind in ("sharded", "stopped")]
    fork_server.start(tmp_path / "2", 2, STOPPED, *files(*several, sharded=True)).succeed()
    for name in PRUNES:
        checkpoints.same_bytes(tmp_path / f"{name}-stopped", tmp_path / f"{name}-sharded")
        one, two = (checkpoints.tensors(tmp_path / each) for each in (name, f"{name}-sharded"))
        for key, value in one.items():
            assert torch.equal(value == 0, two[key] == 0), key
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)
        rows, truth = (
            json.loads((tmp_path / each / "report.json").read_text())["training"]["history"]
            for each in (f"{name}-sharded", name)
        )
        for row, other in zip(rows, truth, strict=True):
            assert row["held_out"] == (other["held_out"] and pytest.approx(other["held_out"]))
