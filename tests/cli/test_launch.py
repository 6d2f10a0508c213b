"""Ranks that ``prunekit run --gpus`` starts: environment, messages, exit codes, signals."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from prunekit.cli import launch
from prunekit.cli.main import main
from prunekit.errors import ConfigError
from tests.support.processes import python

RANK = "import os, sys; rank = int(os.environ['RANK'])\n"
ERROR = "from prunekit.cli.app import report_error\nsys.exit(report_error(2, sys.argv[1 + rank]))"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in launch.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start(monkeypatch):
    """Run a script in ranks; its standard output and error are those of this process."""

    def start(script, *arguments, count=2):
        monkeypatch.setattr(launch, "COMMAND", (sys.executable, "-P", "-c", RANK + script))
        return launch.launch(count, arguments)

    return start


def test_ranks_are_told_of_each_other_and_rank_0_listens(start, tmp_path):
    """Nobody else can take the port meanwhile, since its socket is open from the beginning."""
    script = """
import json, socket
from prunekit.distributed.join import LISTENER
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
if rank:
    socket.create_connection(address).sendall(b"here")
else:
    listener = socket.socket(fileno=int(os.environ[LISTENER]))
    assert listener.getsockname() == address
    assert listener.accept()[0].recv(9) == b"here"
names = "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", LISTENER
found = [os.environ.get(name) for name in names], sys.stdin.read()
open(f"{sys.argv[1]}/{rank}", "w").write(json.dumps(found))
"""
    assert start(script, str(tmp_path)) == 0
    (first, _), (second, piped) = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert (first[:3], second) == (["0", "2", "2"], ["1", "2", "2", None])
    assert piped == ""


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (["model: no.", "model: no."], "model: no.\n"),
        (["model: no.", "other: no."], "model: no.\nRank 1: other: no.\n"),
        (["rank 1 on a failed: disk: full. Resume.", "disk: full."],
         "rank 1 on a failed: disk: full. Resume.\n"),
    ],
)  # fmt: skip
def test_a_message_is_printed_once(start, capfd, said, shown):
    assert start(ERROR, *said) == 2
    assert capfd.readouterr() == ("", shown)


@pytest.mark.parametrize(
    ("codes", "code"), [("00", 0), ("010", 1), ("122", 2), ("10", 1), (("0", "143"), 143)]
)
def test_the_exit_code_is_that_of_the_rank_with_the_cause(start, codes, code):
    """Others fail with 1, since that rank has."""
    assert start("sys.exit(int(sys.argv[1 + rank]))", *codes, count=len(codes)) == code


def test_a_rank_that_was_killed_is_named(start, capfd):
    assert start("os.kill(os.getpid(), rank and 9)") == 1
    assert capfd.readouterr().err == "Rank 1: killed by SIGKILL.\n"


def test_a_rank_that_does_not_end_after_the_others_is_killed(start, capfd, monkeypatch):
    monkeypatch.setattr(launch, "LAST_SECONDS", 0.1)
    assert start("import time; time.sleep(600 * rank)") == 1
    assert capfd.readouterr().err == "Rank 1: killed by SIGKILL.\n"


STOPPED = """
import time
time.sleep(0.1 * rank)  # deaf so far
from prunekit.cli.app import report_error
from prunekit.cli.signals import StopSignals
signals = StopSignals()
signals.patient = True
with signals:
    while not signals.requested():
        open(f"{sys.argv[1]}/{rank}", "w").close()
        time.sleep(0.01)
    time.sleep(0.2)
assert len(signals.received) == 1
sys.exit(report_error(signals.exit_code, "Stopped."))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ready", [0, 2])
def test_a_signal_reaches_each_rank_once_even_while_it_starts(
    start, tmp_path, capfd, number, ready
):
    before = [signal.getsignal(each) for each in launch.SIGNALS]
    if signal.SIG_IGN in before:
        pytest.skip("a signal is ignored, as under nohup, and remains so")

    def stop():
        while not launched or len([*tmp_path.iterdir()]) < ready:
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    launched, real = [], launch.Popen
    launch.Popen = lambda *given, **options: launched.append(1) or real(*given, **options)
    thread = Thread(target=stop)
    thread.start()
    try:
        assert start(STOPPED, str(tmp_path)) == 128 + number
    finally:
        launch.Popen = real
    thread.join()
    said = capfd.readouterr().err
    assert said.count("Stopped.") == 1
    assert said.count("Stopping after the current") == 1
    assert [signal.getsignal(each) for each in launch.SIGNALS] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.fixture
def config_of():
    def make(device):
        return SimpleNamespace(model=SimpleNamespace(device=device))

    return make


def test_ranks_of_a_launcher_start_none(config_of, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"--gpus 2: WORLD_SIZE is set, .* such as torchrun"):
        launch.check_can_launch(2, config_of("cpu"))


@pytest.mark.parametrize(
    ("count", "device", "gpus", "message"),
    [
        (0, "cpu", 0, "--gpus 0: must be at least 1"),
        (2, "cuda:1", 8, 'model.device is "cuda:1", which is one GPU'),
        (2, "auto", 0, "--gpus 2: torch can use no GPUs of this machine. .* model.device=cpu"),
        (2, "cuda", 1, "--gpus 2: torch can use 1 GPU of"),
        (8, "auto", 4, "--gpus 8: torch can use 4 GPUs of"),
    ],
)
def test_more_ranks_than_gpus_are_refused(config_of, monkeypatch, count, device, gpus, message):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=message):
        launch.check_can_launch(count, config_of(device))


@pytest.mark.parametrize(
    ("count", "device", "gpus"), [(9, "cpu", 0), (4, "auto", 4), (1, "cuda:0", 1)]
)
def test_as_many_ranks_as_gpus_and_any_number_on_the_cpu(
    config_of, monkeypatch, count, device, gpus
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    launch.check_can_launch(count, config_of(device))


@pytest.fixture
def launched(monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "launch", lambda *given: seen.append(given) or 7)
    return seen


def test_each_rank_gets_the_command_without_the_option(config, launched):
    options = ["--resume", "--overwrite", "--quiet", "--set", "model.device=cpu"]
    assert main(["run", config, "--gpus", "3", *options]) == 7
    assert launched == [(3, ["run", config, *options])]


def test_a_sweep_is_refused(config, launched, capsys):
    Path("a.txt").write_text("text")
    sweep = ["sweep.sparsity=[0.5]", "evaluate.data=a.txt", "prune.pattern=unstructured"]
    sweep = [part for each in sweep for part in ("--set", each)]
    assert main(["run", config, "--gpus", "2", *sweep]) == 2
    assert "--gpus 2: the runs of a sweep are one process each" in capsys.readouterr().err
    assert not launched


def test_one_process_is_started_by_nobody(config, launched, run):
    seen = run()
    assert main(["run", config, "--gpus", "1", "--quiet", "--set", "model.device=cpu"]) == 0
    assert seen["quiet"]
    assert not launched


def test_the_hint_how_to_resume_has_the_number_of_processes(config, run, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    run(records=stop)
    monkeypatch.setenv(launch.LAUNCHER, "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    Path("out").mkdir()
    Path("out/journal.jsonl").touch()
    assert main(["run", config]) == 130
    assert capsys.readouterr().err.endswith(
        "To resume: prunekit run config.toml --resume --gpus 1\n"
    )


def test_mistakes_are_said_before_any_rank_or_torch(config):
    code = (
        "import sys; from prunekit.cli.main import main; "
        "run = ['run', 'config.toml', '--set', 'model.device=cpu', '--gpus']; "
        "assert main([*run, '2', '--set', 'prune.steps=0']) == 2; "
        "assert main([*run, '0']) == 2; sys.exit('torch' in sys.modules)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "--set prune.steps=0: 0 is not possible: at least 1.",
        "--gpus 0: must be at least 1.",
    ]


def test_a_traceback_that_all_ranks_have_is_printed_once(start, capfd):
    script = "from prunekit import __main__ as command; command.run = lambda: 1 / 0; command.main()"
    assert start(script, count=3) == 1
    said = capfd.readouterr().err
    assert said.startswith("Traceback (most recent call last):\n")
    assert said.endswith("ZeroDivisionError: division by zero\n")
    assert said.count("Traceback") == 1
