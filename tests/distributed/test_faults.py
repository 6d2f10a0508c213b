"""Faults while several ranks run: they are reported, and nothing is lost."""

import os
import shutil
import signal
import socket
import time

import pytest
import torch

from tests.distributed import configs
from tests.distributed.phases import slow_blocks
from tests.support import checkpoints
from tests.support.fault_table import record

BLOCKS = 4
IN_TIME = 60
"""Seconds in which the others have to stop once a rank has died."""
CLI = """
from prunekit.cli import main as cli
code = cli.main(["run", *arguments, "--quiet"])
"""
QUICK = """
# A live rank is heard of more often, so that less silence says that one is dead.
from prunekit.distributed import heartbeat as watch
watch.BEAT_SECONDS, watch.SUSPECT_SECONDS = 0.1, 1.5
watch.GRACE_SECONDS, watch.DEAD_SECONDS = 0.4, 10.0
from prunekit.distributed import join as joining
joining.JOIN_SECONDS = 10.0
"""
SLOW = slow_blocks(0.4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"), num_hidden_layers=BLOCKS)


@pytest.fixture
def start(fork_server, model, tmp_path):
    """Start ranks that prune into a folder of ``tmp_path``."""
    count = iter(range(1000))

    def begin(size, output, *options, script="", model=model):
        number = next(count)
        file = configs.write(tmp_path / f"{output}.toml", model, tmp_path / output, evaluate=None)
        return fork_server.start(tmp_path / f"said-{number}", size, script + CLI, file, *options)

    return begin


@pytest.fixture(scope="module")
def whole(fork_server, model, tmp_path_factory):
    """The output of two ranks without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    file = configs.write(folder / "c.toml", model, folder / "out", evaluate=None)
    fork_server.start(folder / "said", 2, CLI, file).succeed()
    return folder / "out"


def same_bytes(mine, theirs):
    names = {path.name for path in theirs.glob("*.safetensors")} | {"config.json"}
    assert [
        name for name in names if (mine / name).read_bytes() != (theirs / name).read_bytes()
    ] == []
    assert not list(mine.glob(".*"))


def same_masks(mine, theirs):
    found, expected = checkpoints.tensors(mine), checkpoints.tensors(theirs)
    for name, tensor in expected.items():
        assert torch.equal(found[name] == 0, tensor == 0), name


def blocks_done(folder):
    journal = folder / "journal.jsonl"
    return journal.read_text().count('"kind": "block"') if journal.is_file() else 0


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("victim", "again", "patience"),
    # Once with the patience of a real run, which after rank 1 is ten seconds.
    [
        (0, 2, ""),
        pytest.param(1, 2, "", marks=pytest.mark.soak),
        (1, 2, QUICK),
        (1, 1, QUICK),
        (0, 3, QUICK),
    ],
    ids=lambda value: "quick" if value == QUICK else str(value) or "patient",
)
def test_a_killed_rank_is_named_and_the_run_is_taken_up(
    start, whole, tmp_path, victim, again, patience
):
    world = start(2, "out", script=patience + SLOW)
    until(lambda: blocks_done(tmp_path / "out") >= 2)
    world.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    codes = world.wait()
    assert time.monotonic() - began < IN_TIME
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    assert f"rank {victim}" in world.stderr(1 - victim)
    start(again, "out", "--resume").succeed()
    (same_bytes if again == 2 else same_masks)(tmp_path / "out", whole)
    record(
        "ranks",
        f"kill -9 of rank {victim} of 2 after 2 of 4 blocks",
        f"rank {1 - victim} stops within a minute and names it; --resume with {again}: "
        + ("same bytes" if again == 2 else "same masks"),
    )


EARLY = """
import os, signal
from torch import distributed
from prunekit.distributed import join as joining
from prunekit.distributed import heartbeat as watch
joining.JOIN_SECONDS, watch.DEAD_SECONDS = 2.0, 2.0
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 1:
    distributed.{where} = die
"""


@pytest.mark.parametrize(
    ("where", "said", "moment"),
    [
        ("TCPStore", "rank 1 did not join within 2 s; rank 0 on {host} did", "before they meet"),
        ("init_process_group", "rank 1 on {host} has sent no sign for 2 s", "while they connect"),
    ],
)
def test_a_rank_that_dies_as_it_begins_is_not_waited_for(start, where, said, moment):
    world = start(2, "out", script=EARLY.format(where=where))
    assert world.wait() == [1, -signal.SIGKILL]
    assert said.format(host=socket.gethostname()) in world.stderr(0)
    record("ranks", f"kill -9 of rank 1 of 2 {moment}", "rank 0 stops within a minute and names it")


def test_a_rank_that_hangs_silently_is_noticed(start, tmp_path):
    """Stopped, it keeps its connections, so that only its heart can tell."""
    script = "from prunekit.distributed import heartbeat; heartbeat.DEAD_SECONDS = 2.0\n" + SLOW
    world = start(2, "out", script=script)
    until(lambda: blocks_done(tmp_path / "out") >= 1)
    world.kill(1, signal.SIGSTOP)
    until(lambda: f"rank 1 on {socket.gethostname()} has sent no sign" in world.stderr(0), 30)
    world.kill(1, signal.SIGKILL)
    assert world.wait()[0] == 1
    record(
        "ranks",
        "rank 1 of 2 hangs",
        "rank 0 stops and names it after 2 s without a sign of it (40 s outside of tests)",
    )


def test_sigterm_finishes_the_block(start, whole, tmp_path):
    world = start(2, "out", script=SLOW)
    until(lambda: blocks_done(tmp_path / "out") >= 1)
    world.kill(1, signal.SIGTERM)
    assert world.wait() == [143, 143]
    assert "--resume" in world.stderr(0)
    assert 1 <= blocks_done(tmp_path / "out") < BLOCKS
    start(2, "out", "--resume").succeed()
    same_bytes(tmp_path / "out", whole)
    record("ranks", "SIGTERM to rank 1 of 2", "both finish the block, exit with 143; same bytes")


def test_a_full_disk_is_said_by_all(start, whole, tmp_path):
    script = """
from prunekit.checkpoint import output
real = output.write_shard
def full(file, tensors):
    if "00003-of" in file.name:
        with output.report_full_disk(file.parent):
            raise OSError(28, "No space left on device")
    return real(file, tensors)
output.write_shard = full
"""
    world = start(2, "out", script=script)
    assert world.wait() == [1, 1]
    assert "the disk is full" in world.stderr(0)
    assert f"rank 0 on {socket.gethostname()} failed" in world.stderr(1)
    assert "the disk is full" in world.stderr(1)
    start(2, "out", "--resume").succeed()
    same_bytes(tmp_path / "out", whole)
    record("ranks", "disk full as rank 0 writes", "both ranks stop and say so; same bytes")


def test_numbers_of_one_rank_that_go_wrong_name_layer_and_sample(start):
    script = """
from prunekit.models.sequential.block_runner import StackRunner
real = StackRunner.enter
def enter(self, ids, context):
    hidden = real(self, ids, context).clone()
    if rank == 1:
        hidden[2, 3, 4] = float("nan")
    return hidden
StackRunner.enter = enter
"""
    world = start(2, "out", script=script)
    assert world.wait() == [1, 1]
    for rank in range(2):
        assert "layers.0.self_attn" in world.stderr(rank)
        assert "calibration sample 6" in world.stderr(rank)
    record("ranks", "NaN from one rank", "all ranks name the layer and the sample")


def test_two_runs_into_one_folder(start):
    world = start(1, "out", script=FORKED)
    world.wait()
    codes = sorted(int(line) for line in (world.folder / "0.out").read_text().split())
    assert codes == [0, 2]
    assert "another run is writing to" in world.stderr(0)
    record("folder", "two runs into one folder", "the second is refused, exit code 2")


FORKED = """
# The second one begins and ends while the first one is in the middle of it.
import os, time
from prunekit.cli import main as cli
from prunekit.runs.sparsify import shards
ended, real = arguments[0] + ".ended", shards.ShardWriter.write_block
def wait(self, *given, **options):
    while not os.path.exists(ended):
        time.sleep(0.02)
    return real(self, *given, **options)
child = os.fork()
if child:
    while not os.path.exists(arguments[0].replace(".toml", "/journal.jsonl")):
        time.sleep(0.02)
else:
    shards.ShardWriter.write_block = wait
code = cli.main(["run", *arguments, "--quiet", "--resume"])
print(code, flush=True)
if child:
    open(ended, "w").close()
    os.waitpid(child, 0)
os._exit(0)
"""


def test_an_input_that_is_cut_off_after_the_plan(start, model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    script = f"""
import os
from prunekit.runs.sparsify import run as running
real = running.SparsifyRun._prune
def cut(self, *arguments):
    os.truncate({str(copy / "model.safetensors")!r}, 5000)
    return real(self, *arguments)
if rank == 0:
    running.SparsifyRun._prune = cut
"""
    world = start(1, "out", script=script, model=copy)
    assert world.wait() == [1]
    assert "model.safetensors: cannot be read any more" in world.stderr(0)
    assert not (tmp_path / "out" / "config.json").exists()
    record("input", "shard cut off after the plan", "stops and names the file; no config.json")


def test_an_input_that_changed_between_runs(start, model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    world = start(2, "out", script=SLOW, model=copy)
    until(lambda: blocks_done(tmp_path / "out") >= 1)
    world.kill(0, signal.SIGTERM)
    world.wait()
    checkpoints.change(copy, "model.layers.0.mlp.up_proj.weight", lambda weight: weight.mul_(2))
    world = start(2, "out", "--resume", model=copy)
    assert world.wait() == [2, 2]
    assert "up_proj.weight was changed since the run began" in world.stderr(0)
    record("input", "a weight changed between two runs", "--resume is refused, exit code 2")


def test_an_output_shard_that_broke_is_made_again(start, whole, tmp_path):
    world = start(2, "other", script=SLOW)
    until(lambda: blocks_done(tmp_path / "other") >= 2)
    world.kill(0, signal.SIGTERM)
    world.wait()
    os.truncate(tmp_path / "other" / f"shard-00002-of-0000{BLOCKS + 1}.safetensors", 900)
    start(2, "other", "--resume").succeed()
    same_bytes(tmp_path / "other", whole)
    record("output", "shard cut off", "--resume prunes its block again; same bytes")


def test_a_bit_that_flipped_in_an_output_shard_is_noticed(start, whole, tmp_path):
    world = start(2, "other", script=SLOW)
    until(lambda: blocks_done(tmp_path / "other") >= 2)
    world.kill(0, signal.SIGTERM)
    world.wait()
    shard = tmp_path / "other" / f"shard-00002-of-0000{BLOCKS + 1}.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 16
    shard.write_bytes(content)
    start(2, "other", "--resume").succeed()
    same_bytes(tmp_path / "other", whole)
    record(
        "output",
        "a bit of a shard flipped",
        "--resume finds another digest and prunes its block again; same bytes",
    )


def test_clocks_that_are_set_change_nothing(start, whole, tmp_path):
    script = """
import time
from prunekit.runs.sparsify import shards
now, real, ahead = time.time, shards.ShardWriter.write_block, [0]
time.time = lambda: now() + ahead[0]
def write(self, *arguments, **options):
    ahead[0] += 86400 if rank else -86400
    return real(self, *arguments, **options)
shards.ShardWriter.write_block = write
"""
    start(2, "out", script=script).succeed()
    same_bytes(tmp_path / "out", whole)
    record("ranks", "clocks are set by a day a block", "nothing happens; same bytes")
