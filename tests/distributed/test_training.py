"""Several ranks train as one process does; ranks that differ or die are named."""

import json
import re
import signal
import socket
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import configs
from tests.distributed.phases import PATIENCE
from tests.distributed.test_faults import until
from tests.support import checkpoints
from tests.support.adapters import PEFT_WARNS
from tests.support.tiers import often

TRAIN = """
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

import prunekit
from prunekit.config.distill_table import Distill
from prunekit.config.train_table import Train
from prunekit.distributed.join import join
from prunekit.training.recover import recover
from tests.support.units import randomized_model

# Of unlike lengths, in batches of 5, 5 and 2: one of three ranks has no sample of the last.
generator = torch.Generator().manual_seed(4)
ids = torch.randint(3, 96, (12, 9), generator=generator)
mask = (torch.arange(9) < torch.tensor([9, 3, 9, 4, 5, 9, 9, 2, 9, 9, 7, 3])[:, None]).long()
rows = ids.split(5), mask.split(5)
batches = [{"input_ids": one, "attention_mask": two} for one, two in zip(*rows)]
settings = Train(steps=14, rate=1e-3, every=1, patience=100)

def new_model():
    model = randomized_model("llama")
    # Without a gradient on any rank it is not subject to weight decay.
    model.unused = torch.nn.Parameter(torch.ones(3))
    return model
"""
CASES = """
def plain(model):
    return [], None

def gated(model):
    heads = prunekit.heads(model)
    heads.prune(heads.score("magnitude"), 0.5)
    for gate in heads.gates.values():
        gate.value.requires_grad_()
    return [heads], None

def pruned(model):
    schedule = {"sparsity": 0.5, "start": 2, "end": 9, "every": 3}
    return [], lambda optimizer: prunekit.GradualPruner(model, optimizer, **schedule)

def taught(model):
    return pruned(model)

with join("cpu") as ranks:
    for case in (plain, gated, pruned, taught):
        model = new_model()
        gates, during = case(model)
        distill = Distill(map="closest", end=9) if case is taught else None
        options = {"during": during, "distill": distill}
        steps = [*recover(model, batches, ids[:3], settings, gates, ranks=ranks, **options)]
        if ranks.is_main:
            numbers = [[each.loss, each.held_out, each.sparsity, each.achieved,
                        *each.distillation.values()] for each in steps]
            Path(arguments[0], f"{case.__name__}.json").write_text(json.dumps(numbers[1:]))
            values = {str(i): v.value for each in gates for i, v in enumerate(each.gates.values())}
            named = {name: each.detach() for name, each in model.named_parameters()} | values
            save_file({name: each.detach() for name, each in named.items()},
                      Path(arguments[0], case.__name__))
"""
APT = """
from prunekit.checkpoint.compressed import KEPT_UNITS_KEY
from prunekit.config.apt_table import Apt
from prunekit.training.apt.loop import apt

settings = Apt(parameters=0.6, kinds=["hidden", "heads", "neurons"], rank=2, warmup=2, window=3,
               windows=2, decay=0.4, steps=10, rate=1e-3, every=1, batch=5)
with join("cpu") as ranks:
    model = randomized_model("llama")
    steps = [*apt(model, batches, ids[:3], settings, ranks=ranks)]
    if ranks.is_main:
        facts = {"losses": [[each.loss, each.held_out] for each in steps[1:]],
                 "details": [each.details for each in steps],
                 "kept": getattr(model.config, KEPT_UNITS_KEY)}
        Path(arguments[0], "apt.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def trained(fork_server, tmp_path_factory):
    """Return the folder with the numbers of each step and the weights of some ranks."""

    @cache
    def of(size):
        folder = tmp_path_factory.mktemp("trained")
        fork_server.start(folder, size, TRAIN + CASES, folder).succeed()
        return folder

    return of


@pytest.mark.parametrize("size", often([2, 3], [3]))
@pytest.mark.parametrize("case", ["plain", "gated", "pruned", "taught"])
def test_several_ranks_train_as_one_process_does(trained, case, size):
    """Losses are averaged over predictions, and gradients summed; with a teacher too."""
    steps, expected = (json.loads((trained(n) / f"{case}.json").read_text()) for n in (size, 1))
    weights, exact = (load_file(trained(n) / case) for n in (size, 1))
    for number, (step, truth) in enumerate(zip(steps, expected, strict=True)):
        assert step[:2] == pytest.approx(truth[:2], rel=1e-5), number
        assert step[2:4] == truth[2:4]
        assert step[4:] == pytest.approx(truth[4:], rel=1e-3, abs=1e-6), number
    for name, weight in weights.items():
        assert torch.equal(weight == 0, exact[name] == 0), name
        torch.testing.assert_close(weight, exact[name], rtol=1e-3, atol=2e-4)
    assert torch.equal(weights["unused"], torch.ones(3))


@pytest.mark.filterwarnings(*PEFT_WARNS)
def test_adapters_prune_the_same_units_and_grow_alike_on_several_ranks(fork_server, tmp_path):
    pytest.importorskip("peft")
    found = []
    for size in (1, 3):
        folder = tmp_path / str(size)
        fork_server.start(folder, size, TRAIN + APT, folder).succeed()
        found.append(json.loads((folder / "apt.json").read_text()))
    one, several = found
    assert one["kept"]
    assert several["kept"] == one["kept"]
    assert several["details"] == one["details"]
    for step, truth in zip(several["losses"], one["losses"], strict=True):
        assert step == pytest.approx(truth, rel=1e-5)


def numbers(row):
    return {key: value for key, value in row.items() if isinstance(value, int | float)}


SCHEDULE = {"end": 6, "every": 2}
RUNS = {
    "under masks": {"method": "wanda", "pattern": "unstructured", "sparsity": 0.5},
    "gradual": {"method": "wanda", "pattern": "unstructured", "sparsity": 0.5, **SCHEDULE},
    "neurons": {"method": "salience", "pattern": "neurons", "sparsity": 0.5, **SCHEDULE},
}


@pytest.mark.soak
def test_runs_that_train_prune_and_train_alike_on_several_ranks(fork_server, tmp_path):
    model = checkpoints.write(tmp_path / "model", num_hidden_layers=1)
    train = {"steps": 8, "rate": 1e-3, "batch": 3, "held_out": 2, "every": 1}
    for size in (1, 2):
        files = [tmp_path / f"{number}-{size}.toml" for number in range(len(RUNS))]
        for file, prune in zip(files, RUNS.values(), strict=True):
            output = file.with_suffix("")
            configs.write(file, model, output, prune=prune, train=train, evaluate=None)
        fork_server.start(tmp_path / f"world{size}", size, configs.RUN, *files).succeed()
    for number, name in enumerate(RUNS):
        one, two = (tmp_path / f"{number}-{size}" for size in (1, 2))
        expected, found = checkpoints.tensors(one), checkpoints.tensors(two)
        for key, value in found.items():
            assert torch.equal(value == 0, expected[key] == 0), (name, key)
        steps, truth = (
            json.loads((folder / "report.json").read_text())["training"]["history"]
            for folder in (two, one)
        )
        assert len(steps) == 9
        for step, each in zip(steps, truth, strict=True):
            assert numbers(step) == pytest.approx(numbers(each), rel=1e-5), name


RANKS = f"rank 0 on {socket.gethostname()}; rank 1 on {socket.gethostname()}"
DIFFERING = """
from prunekit.errors import NumericsError

model = new_model()
weight = model.model.layers[1].mlp.up_proj.weight

@contextmanager
def nudged(optimizer):
    def nudge(*_):
        if ranks.rank and optimizer.state[weight]["step"] == 3:
            weight.data[0, 0] *= 1 + 2**-22
    optimizer.register_step_post_hook(nudge)
    yield None

with join("cpu") as ranks:
    for changes in (False, True):
        if changes and ranks.rank:
            batches[1]["input_ids"][2, 3] += 1
        try:
            [*recover(model, batches, ids[:3], settings, ranks=ranks, during=nudged)]
        except NumericsError as error:
            Path(arguments[0], f"{rank}").open("a").write(f"{error}\\n")
        weight.data.zero_()
"""


def test_ranks_that_differ_stop_with_the_name_of_the_tensor(fork_server, tmp_path):
    fork_server.start(tmp_path, 2, TRAIN + DIFFERING, tmp_path).succeed()
    said = [(tmp_path / rank).read_text().splitlines() for rank in "01"]
    assert said[0] == said[1]
    assert [re.sub(r"\d+ on rank", "rank", line) for line in said[0] if "Pass" not in line] == [
        "train: after step 3 ranks differ in",
        f"  model.layers.1.mlp.up_proj.weight: {RANKS}",
        "train: after step 0 ranks differ in",
        f"  data[1].input_ids: {RANKS}",
    ]


ENDLESS = """
model = new_model()
settings = Train(steps=10**6, rate=1e-4, every=10**6)
with join("cpu") as ranks:
    for step in recover(model, batches, ids, settings, ranks=ranks):
        if step.step:
            Path(arguments[0], f"reached-{rank}").touch()
"""


@pytest.mark.parametrize("victim", often([1, 0], [1]))
def test_a_rank_killed_in_training_ends_all_with_its_name(fork_server, tmp_path, victim):
    world = fork_server.start(tmp_path, 3, PATIENCE + TRAIN + ENDLESS, tmp_path)
    until(lambda: len([*tmp_path.glob("reached-*")]) == 3)
    world.kill(victim, signal.SIGKILL)
    codes = world.wait()
    for rank in {0, 1, 2} - {victim}:
        assert codes[rank] in {1, 99}
        assert f"rank {victim} " in world.stderr(rank)
