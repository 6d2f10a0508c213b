"""Ranks on several hosts, one of which is cut off, slowed or ended; the folder is in common.

The hosts are network namespaces of this machine, so the tests need its administrator.
"""

import os
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from tests.distributed import configs
from tests.distributed.hosts import INTERFACE, Hosts
from tests.distributed.phases import CLI, PATIENCE, PHASES, stop_in
from tests.distributed.test_faults import IN_TIME, same_bytes, until
from tests.support import checkpoints
from tests.support.fault_table import record

WANDA = {"method": "wanda", "pattern": "2:4"}
"""Masks do not depend on the order of sums, and kept weights keep their values."""


@pytest.fixture(scope="module")
def hosts():
    made = {count: Hosts(count) for count in (2, 3)}
    try:
        made[3].create()
    except OSError as error:
        made[3].delete()
        pytest.skip(f"network namespaces are not permitted here: {error}")
    # Two hosts are the first two of three.
    for name in ("names", "addresses", "namespaces"):
        setattr(made[2], name, getattr(made[3], name)[:2])
    yield made
    made[3].delete()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def whole(fork_server, model, tmp_path_factory):
    """The output of one process without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    file = configs.write(folder / "c.toml", model, folder / "out", prune=WANDA, evaluate=None)
    fork_server.start(folder / "said", 1, CLI, file).succeed()
    return folder / "out"


@pytest.fixture
def start(fork_server, hosts, model, tmp_path):
    """Start ranks on some hosts, which wait in a phase."""
    file = configs.write(tmp_path / "c.toml", model, tmp_path / "out", prune=WANDA, evaluate=None)

    def begin(count, size, *options, script=""):
        folder = tmp_path / f"said-{len([*tmp_path.iterdir()])}"
        return fork_server.start(
            folder, size, script + CLI, file, *options, hosts=hosts[count] if count else None
        )

    return begin


def ends(world, tmp_path, seconds=IN_TIME):
    """Let all ranks go on; return their exit codes once they have ended in time."""
    began = time.monotonic()
    (tmp_path / "go").touch()
    codes = world.wait()
    assert time.monotonic() - began < seconds
    return codes


def is_named(world, codes, case):
    """Assert that all others name a rank of the lost host, and it one that it does not reach."""
    for rank, code in enumerate(codes):
        said = world.stderr(rank)
        assert "Traceback" not in said
        if rank % case.count != case.lost:
            assert code == 1, said
            assert f" on host{case.lost}" in said
        elif code != -signal.SIGKILL:
            assert code == 1, said
            assert re.search(rf" on host[^{case.lost}]", said)


class Case(NamedTuple):
    """A host that is lost: of ``count`` hosts with ``size`` ranks, ``lost`` is ``fault``."""

    count: int
    size: int
    phase: str
    fault: str
    lost: int


CASES = [
    Case(count, size, phase, fault, lost)
    for count, size in ((2, 2), (3, 3), (2, 4))
    for phase in PHASES
    for fault in ("cut off", "ended")
    for lost in ({0, count - 1} if size < 4 else {1})
]


def lose(world, hosts, tmp_path, case):
    """Lose a host once the phase is reached; return the exit codes of all ranks."""
    until(lambda: any(path.name.startswith("reached") for path in tmp_path.iterdir()))
    if case.fault == "ended":
        for rank in range(case.lost, case.size, case.count):
            world.kill(rank, signal.SIGKILL)
        return ends(world, tmp_path)
    lost = hosts[case.count].down if case.fault == "down" else hosts[case.count].cut_off
    with lost(case.lost):
        return ends(world, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_host_that_is_lost_is_named_and_fewer_go_on(start, hosts, whole, tmp_path, case):
    world = start(case.count, case.size, script=PATIENCE + stop_in(case.phase, tmp_path))
    is_named(world, lose(world, hosts, tmp_path, case), case)
    fewer = case.size * (case.count - 1) // case.count
    start(0, fewer, "--resume").succeed()
    same_bytes(tmp_path / "out", whole)
    record(
        "hosts",
        f"host {case.lost} of {case.count} ({case.size} ranks) is {case.fault} in {case.phase}",
        f"all end and name it; --resume with {fewer}: same bytes",
    )


def test_a_host_that_is_cut_off_is_named_and_one_rank_goes_on(start, hosts, whole, tmp_path):
    case = Case(2, 2, "prune", "cut off", 1)
    world = start(2, 2, script=PATIENCE + stop_in("prune", tmp_path))
    is_named(world, lose(world, hosts, tmp_path, case), case)
    assert "10.77.0.1:" in world.stderr(1)
    start(0, 1, "--resume").succeed()
    same_bytes(tmp_path / "out", whole)


@pytest.mark.soak
@pytest.mark.parametrize("fault", ["cut off", "down"])
@pytest.mark.parametrize("lost", [0, 2])
def test_with_the_patience_of_a_real_run_all_end_within_a_minute(
    start, hosts, whole, tmp_path, fault, lost
):
    case = Case(3, 3, "prune", fault, lost)
    world = start(3, 3, script=stop_in("prune", tmp_path))
    is_named(world, lose(world, hosts, tmp_path, case), case)
    start(0, 2, "--resume").succeed()
    same_bytes(tmp_path / "out", whole)
    record("hosts", f"host {lost} of 3 is {fault}", "all end within a minute and name it")


@pytest.mark.soak
def test_a_host_that_is_slow_is_waited_for(start, hosts, whole, tmp_path):
    with hosts[2].slowed(1, "300kbit"):
        start(2, 2).succeed()
    same_bytes(tmp_path / "out", whole)
    record("hosts", "host 1 of 2 sends 300 kbit/s", "the run goes on; same bytes")


@pytest.mark.soak
def test_a_host_that_pauses_is_waited_for(start, hosts, whole, tmp_path):
    world = start(2, 2, script=stop_in("prune", tmp_path))
    until((tmp_path / "reached-1").exists)
    world.kill(1, signal.SIGSTOP)
    (tmp_path / "go").touch()
    time.sleep(15)
    world.kill(1, signal.SIGCONT)
    world.succeed()
    same_bytes(tmp_path / "out", whole)
    record("hosts", "host 1 of 2 pauses for 15 s", "the run goes on; same bytes")


@pytest.mark.soak
def test_a_host_that_never_joins_is_named(start, hosts, tmp_path):
    with hosts[3].cut_off(2):
        world = start(3, 3, script=PATIENCE)
        assert world.wait() == [1, 1, 1]
    for rank in range(2):
        assert "rank 2 did not join within 5 s; rank 0 on host0, rank 1 on" in world.stderr(rank)
    assert "rank 2 of 3 did not reach rank 0 at 10.77.0.1:" in world.stderr(2)
    assert not (tmp_path / "out").exists()
    record("hosts", "host 2 of 3 does not join", "all end and name it; nothing is written")


TORCHRUN = """
import os, sys
rank, arguments = int(os.environ["RANK"]), sys.argv[1:]
{stop}{cli}
sys.exit(code)
"""


@pytest.mark.soak
@pytest.mark.parametrize("lost", [None, 0, 1])
def test_torchrun_over_two_hosts(start, hosts, whole, tmp_path, lost):
    """With processes of their own, which also have to get through the end of the interpreter."""
    script, config = tmp_path / "ranks.py", tmp_path / "c.toml"
    stop = "" if lost is None else stop_in("prune", tmp_path)
    script.write_text(TORCHRUN.format(stop=stop, cli=CLI))
    address = ("--master-addr", hosts[2].addresses[0], "--master-port", "29500")
    options = ("--nnodes", "2", "--nproc-per-node", "1", *address)
    launchers = []
    for number in range(2):
        torchrun = (sys.executable, "-m", "torch.distributed.run", *options)
        given = (*torchrun, "--node-rank", str(number), str(script), str(config))
        launchers.append(
            subprocess.Popen(
                hosts[2].command(number, *given),
                env=os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    if lost is None:
        assert [(each.communicate()[1], each.returncode)[1] for each in launchers] == [0, 0]
    else:
        until(lambda: any(path.name.startswith("reached") for path in tmp_path.iterdir()), 120)
        began = time.monotonic()
        with hosts[2].cut_off(lost):
            (tmp_path / "go").touch()
            said = [each.communicate()[1] for each in launchers]
        assert time.monotonic() - began < IN_TIME
        assert all(each.returncode for each in launchers)
        assert f"rank {lost} on host{lost}" in said[1 - lost]
        start(0, 1, "--resume").succeed()
        record("hosts", f"host {lost} of 2 under torchrun is cut off", "all end within a minute")
    same_bytes(tmp_path / "out", whole)
