"""Ranks that do not do the same work: all say so and end, and nothing is written."""

import os
import shutil
import socket
import time

import pytest

from prunekit.checkpoint.header import read_header
from tests.distributed import configs
from tests.support import checkpoints
from tests.support.fault_table import record

QUICK = """
from prunekit.distributed import calls, heartbeat, join as joining
joining.JOIN_SECONDS = 10.0
calls.STALL_SECONDS, heartbeat.GRACE_SECONDS, heartbeat.BEAT_SECONDS = 2.0, 0.4, 0.1
"""
RUN = """
from prunekit.cli import main as cli
code = cli.main(["run", arguments[rank], "--quiet"])
"""
SPARSEGPT = {"method": "sparsegpt", "pattern": "2:4"}
HEADS = {"method": "obs", "pattern": "heads", "sparsity": 0.5}
SETTINGS = {
    "prune.damping": ({"prune": SPARSEGPT}, {"prune": SPARSEGPT | {"damping": 0.1}}),
    "prune.skip": ({"prune": SPARSEGPT}, {"prune": SPARSEGPT | {"skip": ["*.0.self_attn.*"]}}),
    "prune.propagation": (
        {"prune": SPARSEGPT | {"propagation": "stage"}},
        {"prune": SPARSEGPT | {"propagation": "block"}},
    ),
    "calibration.seed": ({}, {"calibration": {"seed": 1}}),
    "job": ({}, {"prune": HEADS}),
}


def first_of(cases, count=1):
    """Return parameters of which all but the first are for the soak tier."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)
        for number, case in enumerate(cases)
        for marks in [pytest.mark.soak if number >= count else ()]
    ]


REFUSED = "both refuse, exit code 2, and say the difference; nothing is written"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture
def start(fork_server, model, tmp_path):
    """Start two ranks, each with sections of its own."""

    def begin(sections=({}, {}), script=""):
        files = [
            configs.write(tmp_path / f"{rank}.toml", model, tmp_path / "out", **own)
            for rank, own in enumerate(sections)
        ]
        return fork_server.start(tmp_path / "said", 2, QUICK + (script or RUN), *files)

    return begin


def refused(world, *said):
    """Assert that both ranks refuse with the same words."""
    assert world.wait() == [2, 2]
    for rank in range(2):
        assert "The ranks of this run differ." in world.stderr(rank)
        assert "Traceback" not in world.stderr(rank)
        for text in said:
            assert text in world.stderr(rank)


@pytest.mark.parametrize("name", first_of(SETTINGS, 2))
def test_another_setting_on_one_rank(start, tmp_path, name):
    world = start(SETTINGS[name])
    refused(world, f"\n  {name}: ", " on rank 0 on ", " on rank 1 on ")
    assert not (tmp_path / "out").exists()
    record("ranks", f"another {name} on rank 1 of 2", REFUSED)


SOFTWARE = """
import prunekit
from prunekit.runs import jobs
if rank:
    {patch}
"""


@pytest.mark.parametrize(
    ("patch", "said"),
    first_of(
        [
            ("prunekit._version.__version__ = '9'", "versions.prunekit: "),
            ("prunekit.reports.environment._version = lambda _: '9'", "versions.torch: "),
            ("jobs.plan_facts = lambda plan: {'device': 'cuda'}", "device: "),
        ]
    ),
)
def test_other_software_or_hardware_on_one_rank(start, tmp_path, patch, said):
    refused(start(script=SOFTWARE.format(patch=patch) + RUN), said)
    assert not (tmp_path / "out").exists()
    record("ranks", f"another {said.removesuffix(': ')} on rank 1 of 2", REFUSED)


ELSEWHERE_STORED = """
from pathlib import Path
from prunekit.runs import preflight
real = preflight.open_checkpoint
if rank:
    preflight.open_checkpoint = lambda _: real(Path({folder!r}))
"""
"""Rank 1 sees another folder at the path of the model."""


@pytest.mark.parametrize(
    ("key", "value"), first_of([("rms_norm_eps", 1e-3), ("intermediate_size", 32)])
)
def test_another_model_on_one_rank(start, model, tmp_path, key, value):
    """It has the same path, as on machines that have each a copy."""
    checkpoints.write(tmp_path / "other", num_hidden_layers=2, **{key: value})
    script = ELSEWHERE_STORED.format(folder=str(tmp_path / "other"))
    refused(start(script=script + RUN), f"config.json.{key}: ")
    assert not (tmp_path / "out").exists()
    record("ranks", f"another {key} in the model of rank 1 of 2", REFUSED)


@pytest.mark.parametrize("case", first_of(["stage", "none", "heads"]))
def test_other_weights_on_one_rank(start, model, tmp_path, case):
    """One bit of one tensor differs, which only reading all of it shows."""
    prune = HEADS if case == "heads" else SPARSEGPT | {"propagation": case}
    name, other = "model.layers.1.mlp.down_proj.weight", shutil.copytree(model, tmp_path / "other")
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(read_header(other / "model.safetensors")[name].start)
        first = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([first ^ 1]))
    script = ELSEWHERE_STORED.format(folder=str(other)) + RUN
    world = start([{"prune": prune, "evaluate": None}] * 2, script=script)
    assert world.wait() == [1, 1]
    for rank in range(2):
        assert f"{name} has other values on rank 1 than on rank 0" in world.stderr(rank)
    assert not (tmp_path / "out/config.json").exists()
    record("ranks", "one bit of a weight differs on rank 1 of 2", "both refuse and name the tensor")


def test_run_on_one_rank_and_evaluate_on_another(start, model, tmp_path):
    script = f"""
from prunekit.cli import main as cli
model = {str(model)!r}
evaluate = ["evaluate", model, "--data", model + "/text.txt", "--length", "12"]
code = cli.main(evaluate if rank else ["run", arguments[0], "--quiet"])
"""
    refused(start(script=script), 'job: "Config" on rank 0', '"evaluate" on rank 1')


def test_evaluate_with_other_text_on_one_rank(start, model):
    script = f"""
from prunekit.cli import main as cli
from prunekit.evaluation import perplexity
real = perplexity.evaluation_tokens
def tokens(*given, **options):
    return real(*given[:3], given[3] - 1 if rank else given[3], **options)
perplexity.evaluation_tokens = tokens
model = {str(model)!r}
data = ["--data", model + "/text.txt", "--length", "12", "--windows", "4"]
code = cli.main(["evaluate", model, *data])
"""
    refused(start(script=script), "tokens.")


WAITING = """
import torch
from prunekit.distributed.join import join
with join("cpu") as ranks:
    {work}
"""
ELSEWHERE = {
    "in another collective": (
        "ranks.all_reduce_sum(torch.ones(3), 'scores') if rank else ranks.all_gather_object(1)",
        "rank 0 on {host} waits in collective 2 (gather of one value from each rank) while rank 1 "
        "on {host} waits in collective 2 (sum of scores, float32 [3])",
    ),
    "at its end": (
        "rank or ranks.all_gather_object(1)",
        "(gather of one value from each rank) while rank 1 on {host} waits in collective 2 (end of",
    ),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_ranks_that_wait_for_each_other_are_named_with_their_places(start, case):
    work, said = ELSEWHERE[case]
    began = time.monotonic()
    world = start(script=WAITING.format(work=work))
    assert all(world.wait())
    assert time.monotonic() - began < 15
    for rank in range(2):
        assert said.format(host=socket.gethostname()) in world.stderr(rank)
    record("ranks", f"rank 1 of 2 is {case}", "both stop and name both ranks and their places")
