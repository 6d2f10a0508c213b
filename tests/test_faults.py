"""Faults injected into runs of one process: nothing is lost, and one clear error says so."""

import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prunekit.checkpoint import output
from prunekit.checkpoint.journal import JOURNAL
from prunekit.config.load import load_config
from prunekit.errors import CapacityError, ConfigError
from prunekit.runs.sparsify import planner
from prunekit.runs.sparsify.run import run
from tests.distributed import configs
from tests.distributed.phases import slow_blocks
from tests.support import checkpoints
from tests.support.checkpoints import planned, same_bytes
from tests.support.fault_table import record
from tests.support.tiers import often

pytestmark = pytest.mark.usefixtures("no_page")

BLOCKS = 3
CLI = """
from prunekit.cli import main as cli
code = cli.main(arguments)
"""
SLOW = slow_blocks(0.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"), num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The output of a run without a fault."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    list(run(planned(model, folder)))
    return folder


@pytest.fixture
def start(fork_server, tmp_path):
    """Start a command in a process of its own."""
    count = itertools.count()

    def begin(*arguments, script=""):
        return fork_server.start(tmp_path / f"said-{next(count)}", 1, script + CLI, *arguments)

    return begin


@pytest.fixture
def config(model, tmp_path):
    """Return a function that writes a config with an output of that name."""

    def write(name, **sections):
        given = {"evaluate": None} | sections
        return configs.write(tmp_path / f"{name}.toml", model, tmp_path / name, **given)

    return write


@pytest.fixture(scope="module")
def whole_of_command(fork_server, model, tmp_path_factory):
    """The output of the command of ``config`` without a fault."""
    folder = tmp_path_factory.mktemp("command")
    file = configs.write(folder / "c.toml", model, folder / "out", evaluate=None)
    fork_server.start(folder / "said", 1, CLI, "run", file, "--quiet").succeed()
    return folder / "out"


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a small file system in memory."""
    mounted = []

    def mount(options):
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, check=False).returncode:
            pytest.skip("mount is not permitted here: a full disk is NOT tested")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


def blocks_done(folder):
    journal = folder / JOURNAL
    return journal.read_text().count('"kind": "block"') if journal.is_file() else 0


# Disks and limits


def fill(folder):
    """Fill a file system to the last byte; return the file."""
    file = folder / "ballast"
    with file.open("wb", buffering=0) as stream:
        try:
            while stream.write(bytes(4096)) == 4096:
                pass
        except OSError:
            pass
    return file


def test_a_full_disk_is_said_and_the_run_is_taken_up(model, whole, small_disk):
    disk = small_disk("size=2m")
    plan = planned(model, disk / "out")
    ballast = []

    def records():
        for each in run(plan):
            if each.kind == "block" and not ballast:
                ballast.append(fill(disk))
            yield each

    with pytest.raises(CapacityError, match=r"the disk is full.*free some space, then run again"):
        list(records())
    assert not (disk / "out/config.json").exists()
    ballast[0].unlink()
    list(run(plan, resume=True))
    same_bytes(disk / "out", whole)
    record("disk", "no byte left after a block", "one error, exit 1; --resume: same bytes")


def test_a_disk_without_room_for_more_files_is_said(model, whole, small_disk):
    disk = small_disk("size=20m,nr_inodes=6")
    plan = planned(model, disk / "out")
    with pytest.raises(CapacityError, match="has no room for more files"):
        list(run(plan))
    subprocess.run(["mount", "-o", "remount,nr_inodes=100", str(disk)], check=True)
    list(run(plan, resume=True))
    same_bytes(disk / "out", whole)
    record("disk", "no inode left after some files", "one error, exit 1; --resume: same bytes")


def test_an_output_that_is_a_mount_is_overwritten(model, whole, small_disk):
    disk = small_disk("size=20m")
    list(run(planned(model, disk, prune={"pattern": "1:4"})))
    list(run(planned(model, disk), overwrite=True))
    same_bytes(disk, whole)
    record("disk", "output is a mount, --overwrite", "same bytes; the mount stays")


def test_an_output_that_is_a_link_is_overwritten(model, whole, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    list(run(planned(model, tmp_path / "link", prune={"pattern": "1:4"})))
    list(run(planned(model, tmp_path / "link"), overwrite=True))
    assert (tmp_path / "link").is_symlink()
    same_bytes(tmp_path / "real", whole)
    record("disk", "output is a link, --overwrite", "same bytes; the link stays")


def test_a_limit_of_the_size_of_files_is_said(model, whole, tmp_path):
    plan, before = planned(model, tmp_path / "out"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(CapacityError, match="files may not become that large"):
            list(run(plan))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").glob(".*"))
    list(run(plan, resume=True))
    same_bytes(tmp_path / "out", whole)
    record("limit", "size of files (RLIMIT_FSIZE)", "one error, exit 1; --resume: same bytes")


MEMORY = """
import resource
from pathlib import Path
from prunekit.config.load import load_config
from prunekit.errors import CapacityError
from prunekit.runs import jobs

records = jobs.run(jobs.plan(load_config(Path(arguments[0]))))
next(records)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (8 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
try:
    list(records)
except CapacityError as error:
    assert "The memory is used up" in str(error), error
    assert "--resume" in str(error), error
else:
    raise AssertionError("the run had memory enough")
"""


def test_a_limit_of_memory_is_said(fork_server, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1}
    model = checkpoints.write(tmp_path / "m", **sizes)
    file = configs.write(tmp_path / "c.toml", model, tmp_path / "out", evaluate=None)
    fork_server.start(tmp_path / "said", 1, MEMORY, file).succeed()
    other = configs.write(tmp_path / "whole.toml", model, tmp_path / "whole", evaluate=None)
    list(run(planner.plan(load_config(other))))
    list(run(planner.plan(load_config(file)), resume=True))
    same_bytes(tmp_path / "out", tmp_path / "whole")
    record(
        "limit", "memory (RLIMIT_AS), while a block is pruned", "one error; --resume: same bytes"
    )


# Signals and streams


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_after_the_block(start, config, whole_of_command, tmp_path, number):
    file = config("out")
    world = start("run", file, "--quiet", script=SLOW)
    until(lambda: blocks_done(tmp_path / "out") >= 1)
    world.kill(0, number)
    assert world.wait() == [128 + number]
    assert "Stopping after the current block" in world.stderr(0)
    assert f"To resume: prunekit run {file} --resume" in world.stderr(0)
    assert 1 <= blocks_done(tmp_path / "out") < BLOCKS
    start("run", file, "--quiet", "--resume").succeed()
    same_bytes(tmp_path / "out", whole_of_command)
    record("signal", f"{number.name} in a block", f"exit {128 + number}; --resume: same bytes")


@pytest.mark.parametrize("phase", ["prune", "write"])
def test_a_second_signal_stops_at_once(start, config, tmp_path, phase):
    world = start("run", config("out"), "--quiet", script=slow_blocks(30, phase))
    until((tmp_path / "out" / JOURNAL).is_file)
    time.sleep(0.3)
    world.kill(0, signal.SIGINT)
    until(lambda: "same signal again" in world.stderr(0))
    world.kill(0, signal.SIGINT)
    assert world.wait() == [130]
    assert time.monotonic() - world.began < 20
    record("signal", "SIGINT twice", "exit 130 at once")


def test_a_process_without_any_stream_writes_the_same(start, config, whole, tmp_path):
    file = config("out", calibration={"samples": 4, "length": 12}, prune=WANDA)
    script = """
import os
import random
from prunekit.cli import streams
for number in range(3):
    os.close(number)
streams.guard_streams()
"""
    start("run", file, script=script).succeed()
    same_bytes(tmp_path / "out", whole)
    record("streams", "stdin, stdout and stderr closed", "exit 0; same bytes")


WANDA = {"method": "wanda", "pattern": "2:4"}


def test_the_end_of_the_reader_of_its_output_does_not_end_a_run(start, config, whole, tmp_path):
    """``prunekit run c.toml 2>&1 | head -1``: writing fails from then on."""
    script = """
import os
import random
from prunekit.cli import streams
streams.guard_streams()
read, write = os.pipe()
os.dup2(write, 1), os.dup2(write, 2)
os.close(read), os.close(write)
"""
    file = config("out", calibration={"samples": 4, "length": 12}, prune=WANDA)
    start("run", file, script=script).succeed()
    same_bytes(tmp_path / "out", whole)
    record("streams", "SIGPIPE: the reader of stderr has ended", "exit 0; same bytes")


def test_clocks_that_are_set_change_nothing(model, whole, tmp_path, monkeypatch):
    now, ahead = time.time, [0]

    def jump():
        ahead[0] = 86400 - ahead[0]
        return now() + ahead[0]

    monkeypatch.setattr(time, "time", jump)
    list(run(planned(model, tmp_path / "out")))
    same_bytes(tmp_path / "out", whole)
    record("clock", "set by a day, forth and back, at each look", "same bytes")


# Kills of single steps


@pytest.mark.parametrize("again", ["resume", "overwrite"])
@pytest.mark.parametrize("moment", often([0, 1, 2, 5, 9], [0, 1, 5]))
def test_a_removal_that_is_cut_off_is_taken_up(model, whole, tmp_path, monkeypatch, moment, again):
    folder = shutil.copytree(whole, tmp_path / "out")
    (folder / "notes.md").write_text("mine")
    unlink, count = Path.unlink, []

    def cut_off(path, missing_ok=False):  # noqa: FBT002
        count.append(path)
        if len(count) > moment:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", cut_off)
        with pytest.raises(KeyboardInterrupt):
            list(run(planned(model, folder), overwrite=True))
    assert not (folder / "config.json").exists() or moment == 0
    list(run(planned(model, folder), **{again: True}))
    same_bytes(folder, whole)
    assert (folder / "notes.md").read_text() == "mine"
    record("kill", "in the removal by --overwrite", "--resume and --overwrite: same bytes")


@pytest.mark.parametrize("moment", range(4))
def test_a_finish_that_is_cut_off_is_taken_up(model, whole, tmp_path, monkeypatch, moment):
    write, count = output.write_atomically, []

    def cut_off(file, content):
        count.append(file)
        if len(count) > moment:
            raise KeyboardInterrupt
        write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(output, "write_atomically", cut_off)
        with pytest.raises(KeyboardInterrupt):
            list(run(planned(model, tmp_path / "out")))
    assert not (tmp_path / "out/config.json").exists()
    list(run(planned(model, tmp_path / "out"), resume=True))
    same_bytes(tmp_path / "out", whole)
    record("kill", "while config, index and companions are written", "--resume: same bytes")


DIES = """
import os, signal
from prunekit.checkpoint import output
real, count = output.{name}, []
def die(*arguments):
    count.append(1)
    if len(count) == {moment}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
output.{name} = die
"""


@pytest.mark.parametrize(("name", "moment"), [("write_shard", 2), ("write_atomically", 2)])
def test_a_conversion_that_was_killed_is_repeated(
    start, whole, tmp_path, monkeypatch, name, moment
):
    arguments = "convert", str(whole), str(tmp_path / "out"), "--format", "2:4"
    small = "from prunekit.inference import convert\nconvert.SHARD_BYTES = 5000\n"
    assert start(*arguments, script=small + DIES.format(name=name, moment=moment)).wait() == [-9]
    assert not (tmp_path / "out/config.json").exists()
    other = start("convert", str(whole), str(tmp_path / "out"), "--format", "bitmask")
    assert other.wait() == [2]
    start(*arguments, script=small).succeed()
    start("convert", str(whole), str(tmp_path / "new"), "--format", "2:4", script=small).succeed()
    same_bytes(tmp_path / "out", tmp_path / "new")
    assert not (tmp_path / "out" / JOURNAL).exists()
    record("kill", "in a conversion", "the same command again: same bytes; another is refused")


UNITS_DIE = """
import os, signal
from pathlib import Path
from prunekit.checkpoint.output import OutputFolder
from prunekit.config.load import load_config
from prunekit.runs import jobs

file, name, moment = arguments
real, count = getattr(OutputFolder, name), []
def die(*given, **options):
    count.append(1)
    if len(count) == int(moment):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **options)
setattr(OutputFolder, name, die)
for each in jobs.run(jobs.plan(load_config(Path(file))), resume=True):
    if (each.kind, each.name) == ("phase", "verify"):
        break
"""
ALL_UNITS = {
    "method": "gradient",
    "pattern": ["blocks", "heads", "neurons"],
    "sparsity": 0.34,
    "compensate": "refit",
}
COORDINATES = {"method": "gradient", "pattern": ["hidden", "neurons"], "sparsity": 0.25}


@pytest.mark.parametrize(
    ("name", "prune"),
    [
        ("append_journal", ALL_UNITS),
        ("write_shard", ALL_UNITS),
        pytest.param("append_journal", COORDINATES, marks=pytest.mark.soak),
    ],
    ids=["journal", "shards", "coordinates"],
)
def test_a_run_over_units_that_is_killed_at_every_step_is_taken_up(
    fork_server, config, tmp_path, name, prune
):
    """Each process is killed when it is about to write for the second time."""
    kills, codes = 0, [-signal.SIGKILL]
    while codes == [-signal.SIGKILL]:
        given = config("out", prune=prune), name, 2
        codes = fork_server.start(tmp_path / f"out-{kills}", 1, UNITS_DIE, *given).wait()
        kills += codes != [0]
        assert kills < 20, "a process wrote nothing"
    assert codes == [0]
    assert kills >= BLOCKS - 1
    whole = config("whole", prune=prune), name, 0
    fork_server.start(tmp_path / "said-whole", 1, UNITS_DIE, *whole).succeed()
    same_bytes(tmp_path / "out", tmp_path / "whole")
    record("kill", f"of a run over units at each {name}", "taken up each time: same bytes")


# Inputs that change


@pytest.fixture
def stopped(model, tmp_path):
    """A copy of the model, and a run of it that stopped after a block."""
    copy = shutil.copytree(model, tmp_path / "model")
    evaluate = {"data": str(copy / "text.txt"), "length": 12, "windows": 2}
    sections = {"evaluate": evaluate}
    records = run(planned(copy, tmp_path / "out", **sections))
    for each in records:
        if each.kind == "block":
            records.close()
    return copy, sections


def change(file, offset):
    """Change a byte of a file, but neither its size nor its time."""
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "offset", "said"),
    [
        ("model.safetensors", -9, "was changed since the run began"),
        ("text.txt", 5, "was begun with another config"),
        ("config.json", -2, "was begun with another config"),
    ],
)
def test_a_run_is_not_taken_up_with_another_input(stopped, tmp_path, name, offset, said):
    copy, sections = stopped
    if name == "config.json":
        (copy / name).write_text((copy / name).read_text() + "\n")
    else:
        change(copy / name, offset)
    with pytest.raises(ConfigError, match=said):
        list(run(planned(copy, tmp_path / "out", **sections), resume=True))
    record("input", f"{name} changed, same size and time", "--resume is refused, exit 2")


def test_a_model_that_was_only_touched_is_taken_up(stopped, model, tmp_path):
    copy, sections = stopped
    os.utime(copy / "model.safetensors", (1, 1))
    list(run(planned(copy, tmp_path / "out", **sections), resume=True))
    list(run(planned(copy, tmp_path / "new", **sections)))
    same_bytes(tmp_path / "out", tmp_path / "new")
    record("input", "model.safetensors with another time only", "--resume: same bytes")


# Runs of every kind, killed at random moments

SWEEP = """
[sweep]
tokens = 0
sparsity = [0.25, 0.5]
"""
KINDS = {
    "by stage, with evaluation": {"evaluate": {"windows": 2}},
    "independent blocks": {"prune": {"method": "magnitude", "pattern": "2:4"}},
    "low-rank adapters": {"prune": {**WANDA, "recover": "lowrank"}},
    "own text": {"calibration": {"data": "self", "samples": 2, "length": 12}},
    "heads and neurons": {"prune": {"method": "obs", "pattern": "neurons", "sparsity": 0.5}},
    "units by loss, refitted": {"prune": ALL_UNITS},
}
SOAK = 150
"""Kills, besides those of several ranks in ``tests/distributed/test_faults.py``."""


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_runs_of_every_kind_are_taken_up_after_random_kills(start, config, tmp_path):
    """Each kill is followed by --resume or, one time in four, by --overwrite."""
    chance, kills, ended = random.Random(seed := random.randrange(2**32)), 0, 0
    files, longest = {}, {}
    for kind, sections in KINDS.items():
        began = time.monotonic()
        start("run", config(f"whole {kind}", **sections), "--quiet").succeed()
        longest[kind] = time.monotonic() - began
        files[kind] = config(f"out {kind}", **sections)
    while kills < SOAK:
        for kind, file in files.items():
            folder = tmp_path / f"out {kind}"
            for _ in range(2):
                option = (
                    "--resume" if chance.random() < 0.75 or not folder.exists() else "--overwrite"
                )
                world = start("run", file, option, "--quiet")
                time.sleep(chance.uniform(0.05, longest[kind]))
                world.kill(0, signal.SIGKILL)
                (code,) = world.wait()
                assert code in {0, -9}, f"seed {seed}: {kind}: {world.stderr(0)}"
                kills += code == -9
            start("run", file, "--resume", "--quiet").succeed()
            same_bytes(folder, tmp_path / f"whole {kind}")
            ended += 1
            if chance.random() < 0.5:
                shutil.rmtree(folder)
    record(
        "kill",
        f"{kills} at random moments of {ended} runs of {len(KINDS)} kinds",
        f"{kills} times taken up; all {ended} end with the same bytes",
    )


@pytest.mark.soak
def test_a_sweep_that_was_killed_is_taken_up_at_once(config, tmp_path):
    """Its worker, which writes the folder of a run, ends with it."""
    prune = {"method": "magnitude", "pattern": "neurons"}
    for name in ("out", "whole"):
        file = config(name, prune=prune, evaluate={"windows": 2}, calibration=None)
        file.write_text(file.read_text() + SWEEP)
    command = sys.executable, "-m", "prunekit", "run"
    first = subprocess.Popen([*command, str(tmp_path / "out.toml"), "--quiet"])
    until(lambda: [*(tmp_path / "out/runs").glob(f"*/{JOURNAL}")] or first.poll() is not None, 120)
    first.kill()
    assert first.wait() == -9
    subprocess.run([*command, str(tmp_path / "out.toml"), "--quiet", "--resume"], check=True)
    subprocess.run([*command, str(file), "--quiet"], check=True)
    for name in ("0.25", "0.5"):
        same_bytes(tmp_path / "out/runs" / name, tmp_path / "whole/runs" / name)
    record("kill", "in a run of a sweep", "--resume at once: same bytes of each run")
