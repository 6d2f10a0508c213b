"""Kills at random moments of commands of every kind; done again, each ends in the same files.

``PRUNEKIT_KILLS`` is the number of kills, ``PRUNEKIT_SEED`` repeats those of an earlier test run.
"""

import os
import random
import shutil
import signal
import time
from typing import NamedTuple

import pytest

from tests.distributed import configs
from tests.distributed.phases import PATIENCE
from tests.inference.test_convert import write_legacy
from tests.support import checkpoints
from tests.support.fault_table import record

KILLS = int(os.environ.get("PRUNEKIT_KILLS", "200"))
BLOCKS = 3
WITHIN_SECONDS = 30
"""Time in which the other ranks have to end, with a tenth of the usual patience."""
RUN = """
import multiprocessing
from prunekit.cli import main as cli
from prunekit.models.sequential import pipeline
pipeline.BATCH_TOKENS["cpu"] = 4 * 24
# Workers are forked from this process, which has imported everything.
contexts = multiprocessing.get_context
multiprocessing.get_context = lambda _: contexts("fork")
code = cli.main(["run", *arguments, "--quiet"])
"""
CONVERT = """
from prunekit.cli import main as cli
from prunekit.inference import convert
convert.SHARD_BYTES = 20000
code = cli.main(arguments)
"""
OWN = "report", "journal"
"""Beginnings of names of files that tell of the run, with its times."""


class Kind(NamedTuple):
    """A kind of command: ranks, and sections of its config or the command itself."""

    ranks: int
    sections: dict
    command: tuple[str, ...] = ()


SPARSEGPT = {"method": "sparsegpt", "pattern": "2:4"}
WANDA = {"method": "wanda", "pattern": "2:4"}
APART = SPARSEGPT | {"propagation": "none"}
HEADS = {"method": "obs", "pattern": "heads", "sparsity": 0.5}
NEURONS = {"method": "flap", "pattern": "neurons", "sparsity": 0.25}
UNITS = {
    "method": "gradient",
    "pattern": ["blocks", "heads", "neurons"],
    "sparsity": 0.34,
    "compensate": "refit",
}
SWEEP = {"method": "flap", "pattern": "neurons"}
KINDS = {
    "by stage": Kind(1, {"prune": SPARSEGPT}),
    "by stage, compressed": Kind(1, {"prune": WANDA, "output": "bitmask"}),
    "by stage, two ranks": Kind(2, {"prune": SPARSEGPT}),
    "by stage, three ranks": Kind(3, {"prune": WANDA, "evaluate": None}),
    "by stage, four ranks": Kind(4, {"prune": WANDA, "evaluate": None}),
    "blocks apart": Kind(1, {"prune": APART}),
    "blocks apart, two ranks": Kind(2, {"prune": APART}),
    "text of the model itself": Kind(1, {"prune": WANDA, "calibration": {"data": "self"}}),
    "low-rank adapters": Kind(1, {"prune": WANDA | {"recover": "lowrank"}}),
    "low-rank adapters, two ranks": Kind(2, {"prune": WANDA | {"recover": "lowrank"}}),
    "heads": Kind(1, {"prune": HEADS}),
    "neurons, two ranks": Kind(2, {"prune": NEURONS}),
    "units by loss, refitted": Kind(1, {"prune": UNITS}),
    "units by loss, refitted, two ranks": Kind(2, {"prune": UNITS}),
    "sweep": Kind(1, {"prune": SWEEP, "sweep": {"sparsity": [0.25, 0.5], "tokens": 0}}),
    "convert": Kind(1, {}, ("convert", "{pruned}/dense", "{output}", "--format", "bitmask")),
    "migrate": Kind(1, {}, ("migrate", "{pruned}/legacy", "{output}", "--format", "dense")),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"), num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def begin(fork_server, model, tmp_path_factory):
    """Start a command of a kind; its output is a folder of that name in ``at``."""
    root = tmp_path_factory.mktemp("said")

    def start(name, at, *options):
        kind, output = KINDS[name], at / output_name(name)
        folder = root / f"{len([*root.iterdir()])}"
        if kind.command:
            given = [part.format(output=output, pruned=at / "pruned") for part in kind.command]
            return output, fork_server.start(folder, 1, CONVERT, *given)
        sections = {**kind.sections}
        if form := sections.pop("output", None):
            options = (*options, "--set", f"output.format={form}")
        file = configs.write(output.with_suffix(".toml"), model, output, **sections)
        return output, fork_server.start(folder, kind.ranks, PATIENCE + RUN, file, *options)

    return start


@pytest.fixture(scope="module")
def whole(begin, fork_server, model, tmp_path_factory):
    """Files and seconds of each kind of command without a fault, and the folder they are in."""
    at, found = tmp_path_factory.mktemp("whole"), {}
    pruned = at / "pruned"
    for form in ("dense", "bitmask"):
        file = configs.write(at / f"{form}.toml", model, pruned / form, prune=WANDA, evaluate=None)
        options = ("--set", f"output.format={form}")
        fork_server.start(at / f"said-{form}", 1, RUN, file, *options).succeed()
    write_legacy(pruned, pruned / "legacy", "bitmask")
    for name in KINDS:
        began = time.monotonic()
        output, world = begin(name, at)
        world.succeed()
        found[name] = contents(output), time.monotonic() - began
    return found, at


def output_name(name):
    return name.replace(" ", "-").replace(",", "")


def contents(folder):
    """Return the files of a folder that do not tell of the run, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(OWN)
    }


def kill(world, victim):
    """Kill a rank, and wait for the others; return whether the kill came before its end."""
    world.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    codes = world.wait()
    assert time.monotonic() - began < WITHIN_SECONDS
    for rank, code in enumerate(codes):
        assert code in {0, 1} or rank == victim, world.stderr(rank)
        if code == 1:
            assert f"rank {victim} " in world.stderr(rank)
    return codes[victim] == -signal.SIGKILL


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_random_kills(begin, whole):
    seed = os.environ.get("PRUNEKIT_SEED") or str(random.randrange(2**32))
    chance, kills, (found, at) = random.Random(seed), dict.fromkeys(KINDS, 0), whole
    while sum(kills.values()) < KILLS:
        name = min(kills, key=lambda each: kills[each])
        expected, longest = found[name]
        where, victim = chance.uniform(0, longest), chance.randrange(KINDS[name].ranks)
        shutil.rmtree(at / output_name(name))
        output, world = begin(name, at)
        time.sleep(where)
        kills[name] += kill(world, victim)
        moment = f"PRUNEKIT_SEED={seed}: {name}, rank {victim} after {where:.3f} s"
        if not KINDS[name].command:
            world = begin(name, at, "--resume")[1]
            assert not any(world.wait()), f"{moment}: {world.stderr(0)}"
        elif not (output / "config.json").exists():
            world = begin(name, at)[1]
            assert not any(world.wait()), f"{moment}: {world.stderr(0)}"
        assert contents(output) == expected, moment
    for name, count in kills.items():
        record("kill", f"{count} at random moments: {name}", "done again each time: same files")
