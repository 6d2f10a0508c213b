"""Estimated operations of runs over units, beside those that PyTorch counts."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from prunekit.architectures import find_architecture
from prunekit.config.load import load_config
from prunekit.distributed.ranks import Ranks
from prunekit.models.layout import stack_runners
from prunekit.runs.structured.blockwise_run import BlockwiseRun
from prunekit.runs.structured.planner import plan
from prunekit.runs.structured.work_estimate import active_parameters
from tests.support import checkpoints
from tests.support.architectures import tiny
from tests.support.structured import write_config

SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
BOTH = 'pattern = ["heads", "neurons"]'


class CountedFlops(TorchDispatchMode):
    """Counts as FlopCounterMode does, in float32 alone: scores are solved in float64.

    The hooks of that mode on modules do not bear gradients by leaves.
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula and args[0].dtype == torch.float32:
            self.total += formula(*args, **(kwargs or {}), out_val=found)
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"), **SIZES)


@pytest.fixture
def planned(folder, tmp_path):
    """Return a function that plans a run of 48 samples."""

    def made(prune, ranks=1, *overrides):
        text = prune if "parameters" in prune else f"{prune}\nsparsity = 0.34"
        path = write_config(folder, tmp_path / "out", text, evaluate=False)
        given = load_config(path, ["calibration.samples=48", *overrides])
        return plan(given, Ranks(0, ranks))

    return made


@pytest.mark.parametrize(
    "prune",
    [
        f'method = "obs"\n{BOTH}',
        f'method = "hybrid"\n{BOTH}',
        f'method = "llm-pruner"\n{BOTH}',
        'method = "gradient"\npattern = ["blocks", "neurons"]\nsteps = 2',
        'method = "leave-one-out"\npattern = "heads"',
    ],
)
def test_operations_are_those_that_are_counted_within_15_percent(planned, prune):
    made = planned(prune)
    run = BlockwiseRun(made).stoppable_records(resume=False, overwrite=False, stop=lambda: False)
    with CountedFlops() as counted:
        for record in run:
            if (record.kind, record.name) == ("phase", "verify"):
                break
    run.close()
    assert made.work.forward + made.work.backward == pytest.approx(counted.total, rel=0.15)


def test_rankers_of_weights_run_no_block(planned):
    work = planned('method = "magnitude"\npattern = "neurons"\ncompensate = "none"').work
    assert not any(vars(work).values())


def test_steps_repeat_the_ranking_and_ranks_share_its_samples(planned):
    prune = 'method = "gradient"\npattern = "neurons"\ncompensate = "none"'
    once, twice = (planned(f"{prune}\nsteps = {steps}").work for steps in (1, 2))
    assert once.times(2) == twice
    half = planned(prune, 2).work
    assert (2 * half.forward, 2 * half.backward) == (once.forward, once.backward)


def test_gram_matrices_and_solves_are_counted_by_reader(planned):
    work = planned('method = "obs"\npattern = "neurons"\ncompensate = "none"').work
    tokens, width, outputs = 48 * 12, 256, 96
    assert work.gather == 3 * tokens * width**2
    # The inverse, a solve for each neuron and sums over it, and the norm of the whole output.
    solve = width**3 + 2 * width * outputs * 2 + 2 * outputs * width**2
    assert work.solve == 3 * solve
    refitted = planned('method = "obs"\npattern = "neurons"\ncompensate = "refit"').work
    assert refitted.gather == 2 * work.gather
    assert refitted.solve > work.solve


def test_of_experts_those_that_a_token_takes_are_counted():
    model = tiny("mixtral")
    runner = stack_runners(model, find_architecture(model))[0]
    block, config = runner.blocks[0], model.config
    experts = sum(each.numel() for each in block.parameters() if each.ndim > 2)
    rest = sum(each.numel() for each in block.parameters() if each.ndim == 2)
    assert config.num_experts_per_tok < config.num_local_experts
    taken = experts * config.num_experts_per_tok // config.num_local_experts
    assert active_parameters(block, runner) == rest + taken
