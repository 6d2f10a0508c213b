"""``prunekit run --gpus`` with ranks on the CPU, from the command to the checkpoint."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import prunekit
from tests.distributed import configs
from tests.distributed.test_faults import CLI, blocks_done, same_bytes, until
from tests.support import checkpoints

MANY = 60
"""Blocks of a model whose run can be stopped before its end."""
ROOT = Path(prunekit.__file__).parents[1]


@pytest.fixture
def command(tmp_path):
    """Start the command on a model of some blocks; it writes into a folder of that name."""

    def start(name, *options, blocks=1, **sections):
        file, model = tmp_path / f"{name}.toml", tmp_path / f"model-{blocks}"
        if not model.exists():
            checkpoints.write(model, num_hidden_layers=blocks)
        configs.write(file, model, tmp_path / name, evaluate=None, **sections)
        return file, subprocess.Popen(
            [sys.executable, "-m", "prunekit", "run", str(file), "--gpus", "2", *options],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/kernels"},
        )

    return start


@pytest.mark.soak
def test_processes_on_the_cpu_prune_as_ranks_of_any_launcher(command, fork_server, tmp_path):
    _, running = command("launched")
    said = running.communicate()[1]
    assert running.returncode == 0, said
    file, model = tmp_path / "forked.toml", tmp_path / "model-1"
    configs.write(file, model, tmp_path / "forked", evaluate=None)
    fork_server.start(tmp_path / "said", 2, CLI, file).succeed()
    same_bytes(tmp_path / "launched", tmp_path / "forked")


def test_an_error_of_the_plan_is_printed_once(command, tmp_path):
    _, running = command("refused", prune={"method": "magnitude", "pattern": "5:7"})
    said = running.communicate()[1]
    assert running.returncode == 2, said
    assert said.count("pattern 5:7 needs a multiple of 7 inputs") == said.count("proj") == 5
    assert said.count("Choose another pattern") == 1
    assert not (tmp_path / "refused").exists()


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_after_a_block(command, tmp_path, number):
    _, whole = command("whole", "--quiet", blocks=MANY)
    assert (whole.communicate()[1], whole.returncode) == ("", 0)
    file, running = command("stopped", "--quiet", blocks=MANY)
    until(lambda: blocks_done(tmp_path / "stopped") or running.poll(), 200)
    running.send_signal(number)
    said = running.communicate()[1]
    assert running.returncode == 128 + number, said
    assert said.count(f"To resume: prunekit run {file} --resume --gpus 2") == 1
    _, resumed = command("stopped", "--quiet", "--resume", blocks=MANY)
    assert (resumed.communicate()[1], resumed.returncode) == ("", 0)
    same_bytes(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.soak
def test_ranks_end_with_the_process_that_started_them(command, tmp_path):
    _, running = command("orphaned", "--quiet", blocks=MANY)
    until(lambda: blocks_done(tmp_path / "orphaned") or running.poll(), 200)
    children = psutil.Process(running.pid).children()
    assert len(children) == 2
    running.kill()
    said = running.communicate()[1]
    assert f"the process {running.pid}, which started the ranks, has ended" in said
    until(lambda: not any(child.is_running() for child in children), 20)


@pytest.mark.soak
def test_a_killed_rank_is_named_and_ends_the_command(command, tmp_path):
    _, whole = command("whole", "--quiet", blocks=MANY)
    assert (whole.communicate()[1], whole.returncode) == ("", 0)
    _, running = command("killed", "--quiet", blocks=MANY)
    until(lambda: blocks_done(tmp_path / "killed") or running.poll(), 200)
    ranks = psutil.Process(running.pid).children()
    victim = next(each for each in ranks if each.environ()["RANK"] == "1")
    victim.kill()
    said = running.communicate()[1]
    assert running.returncode == 1, said
    assert "Rank 1: killed by SIGKILL." in said
    assert "rank 1 on" in said
    _, resumed = command("killed", "--quiet", "--resume", blocks=MANY)
    assert (resumed.communicate()[1], resumed.returncode) == ("", 0)
    same_bytes(tmp_path / "killed", tmp_path / "whole")
