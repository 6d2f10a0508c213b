"""Faults while several ranks run: they are reported, and nothing is lost.

Each fault adds a line to a table; with ``PRUNEKIT_RESULTS=1`` it is written to ``bench/results``.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from prunekit.checkpoint.reader import INDEX_FILE
from tests.distributed import configs
from tests.support import checkpoints

BLOCKS = 4
SOAK = 50
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
import datetime
from prunekit.distributed import ranks
ranks.RENDEZVOUS_TIMEOUT = datetime.timedelta(seconds=10)
"""
SLOW = """
import time
from prunekit.runs.sparsify import shards
real = shards.ShardWriter.write_block
def slow(self, *arguments, **options):
    time.sleep(0.4)
    return real(self, *arguments, **options)
shards.ShardWriter.write_block = slow
"""
TABLE = Path(__file__).parents[2] / "bench/results/faults.md"


@pytest.fixture(scope="module")
def table():
    lines = ["| fault | moment | outcome |", "|---|---|---|"]
    yield lambda *cells: lines.append(f"| {' | '.join(cells)} |")
    if os.environ.get("PRUNEKIT_RESULTS"):
        TABLE.write_text("\n".join(lines) + "\n")


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
    names = {path.name for path in theirs.glob("*.safetensors")} | {"config.json", INDEX_FILE}
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


@pytest.mark.parametrize(("victim", "again"), [(0, 2), (1, 2), (1, 1), (0, 3)])
def test_a_killed_rank_is_named_and_the_run_is_taken_up(
    start, whole, table, tmp_path, victim, again
):
    # Once with the patience of a real run.
    world = start(2, "out", script=SLOW if again == 2 else QUICK + SLOW)
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
    table(
        f"kill −9 of rank {victim} of 2",
        "after 2 of 4 blocks",
        f"rank {1 - victim} stops within a minute and names it; --resume with {again}: "
        + ("same bytes" if again == 2 else "same masks"),
    )


EARLY = """
import os, signal, datetime
from torch import distributed
from prunekit.distributed import ranks
from prunekit.distributed import heartbeat as watch
ranks.RENDEZVOUS_TIMEOUT, watch.DEAD_SECONDS = datetime.timedelta(seconds=2), 2.0
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 1:
    distributed.{where} = die
"""


@pytest.mark.parametrize(
    ("where", "said", "moment"),
    [
        ("rendezvous", "not all of the 2 ranks joined within 2 s", "before the ranks meet"),
        ("init_process_group", "rank 1 has sent no sign for 2 s", "while they connect"),
    ],
)
def test_a_rank_that_dies_as_it_begins_is_not_waited_for(start, table, where, said, moment):
    world = start(2, "out", script=EARLY.format(where=where))
    assert world.wait() == [1, -signal.SIGKILL]
    assert said in world.stderr(0)
    table("kill −9 of rank 1 of 2", moment, "rank 0 stops within a minute and says so")


def test_a_rank_that_hangs_silently_is_noticed(start, table, tmp_path):
    """Stopped, it keeps its connections, so that only its heart can tell."""
    script = "from prunekit.distributed import heartbeat; heartbeat.DEAD_SECONDS = 2.0\n" + SLOW
    world = start(2, "out", script=script)
    until(lambda: blocks_done(tmp_path / "out") >= 1)
    world.kill(1, signal.SIGSTOP)
    until(lambda: "rank 1 has sent no sign" in world.stderr(0), 30)
    world.kill(1, signal.SIGKILL)
    assert world.wait()[0] == 1
    table(
        "rank 1 of 2 hangs",
        "any",
        "rank 0 stops and names it after 2 s without a sign of it (40 s outside of tests)",
    )


def test_sigterm_finishes_the_block(start, whole, table, tmp_path):
    world = start(2, "out", script=SLOW)
    until(lambda: blocks_done(tmp_path / "out") >= 1)
    world.kill(1, signal.SIGTERM)
    assert world.wait() == [143, 143]
    assert "--resume" in world.stderr(0)
    assert 1 <= blocks_done(tmp_path / "out") < BLOCKS
    start(2, "out", "--resume").succeed()
    same_bytes(tmp_path / "out", whole)
    table("SIGTERM to rank 1 of 2", "in a block", "both finish it, exit with 143; same bytes")


def test_a_full_disk_is_said_by_all(start, whole, table, tmp_path):
    script = """
from prunekit.checkpoint import output
real = output.write_shard
def full(file, tensors):
    if "00003-of" in file.name:
        with output.report_full_disk(file.parent):
            raise OSError(28, "No space left on device")
    real(file, tensors)
output.write_shard = full
"""
    world = start(2, "out", script=script)
    assert world.wait() == [1, 1]
    assert "the disk is full" in world.stderr(0)
    assert "rank 0 failed" in world.stderr(1)
    assert "the disk is full" in world.stderr(1)
    start(2, "out", "--resume").succeed()
    same_bytes(tmp_path / "out", whole)
    table("disk full", "rank 0 writes block 2", "both ranks stop and say so; same bytes")


def test_numbers_of_one_rank_that_go_wrong_name_layer_and_sample(start, table):
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
    table("NaN from one rank", "in block 0", "all ranks name the layer and the sample")


def test_two_runs_into_one_folder(start, table):
    world = start(1, "out", script=FORKED)
    world.wait()
    codes = sorted(int(line) for line in (world.folder / "0.out").read_text().split())
    assert codes == [0, 2]
    assert "another run is writing to" in world.stderr(0)
    table("two runs into one folder", "at once", "the second is refused, exit code 2")


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


def test_an_input_that_is_cut_off_after_the_plan(start, model, table, tmp_path):
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
    table("input shard cut off", "after the plan", "stops and names the file; no config.json")


def test_an_input_that_changed_between_runs(start, model, table, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    world = start(2, "out", script=SLOW, model=copy)
    until(lambda: blocks_done(tmp_path / "out") >= 1)
    world.kill(0, signal.SIGTERM)
    world.wait()
    os.utime(copy / "model.safetensors", (1, 1))
    world = start(2, "out", "--resume", model=copy)
    assert world.wait() == [2, 2]
    assert "was begun with another config, model" in world.stderr(0)
    table("input file changed", "between two runs", "--resume is refused, exit code 2")


def test_an_output_shard_that_broke_is_made_again(start, whole, table, tmp_path):
    world = start(2, "other", script=SLOW)
    until(lambda: blocks_done(tmp_path / "other") >= 2)
    world.kill(0, signal.SIGTERM)
    world.wait()
    os.truncate(tmp_path / "other" / f"model-00002-of-0000{BLOCKS + 1}.safetensors", 900)
    start(2, "other", "--resume").succeed()
    same_bytes(tmp_path / "other", whole)
    table("output shard cut off", "between two runs", "--resume prunes its block again; same bytes")


def test_a_bit_that_flipped_in_an_output_shard_is_noticed(start, whole, table, tmp_path):
    world = start(2, "other", script=SLOW)
    until(lambda: blocks_done(tmp_path / "other") >= 2)
    world.kill(0, signal.SIGTERM)
    world.wait()
    shard = tmp_path / "other" / f"model-00002-of-0000{BLOCKS + 1}.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 16
    shard.write_bytes(content)
    start(2, "other", "--resume").succeed()
    same_bytes(tmp_path / "other", whole)
    table(
        "a bit of an output shard flipped",
        "between two runs",
        "--resume finds another digest and prunes its block again; same bytes",
    )


def test_clocks_that_are_set_change_nothing(start, whole, table, tmp_path):
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
    table("clocks are set, a day a block", "while two ranks run", "nothing happens; same bytes")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_random_kills(start, whole, table, tmp_path):
    """Kill runs at random moments; each is followed by a resumed run."""
    seed = random.randrange(2**32)
    chance, kills, runs = random.Random(seed), 0, 0
    began = time.monotonic()
    start(2, "timed").succeed()
    longest = time.monotonic() - began
    while kills < SOAK:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for _ in range(3):
            world = start(2, "out", "--resume", script=QUICK)
            time.sleep(chance.uniform(0, longest))
            victim = chance.randrange(2)
            world.kill(victim, signal.SIGKILL)
            codes = world.wait()
            assert codes[1 - victim] in {0, 1}, f"seed {seed}: {world.stderr(1 - victim)}"
            kills += codes[victim] == -signal.SIGKILL
        start(2, "out", "--resume").succeed()
        same_bytes(tmp_path / "out", whole)
        runs += 1
    table(
        "kill −9 of either rank",
        f"{kills} at random moments of {runs} runs",
        f"{kills} times taken up; all {runs} end with the same bytes",
    )
