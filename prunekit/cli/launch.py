"""Start the ranks of a run on this machine.

Launchers of torch end their processes some time after a signal, with exit codes of their own; here
each rank may finish its block, and the exit codes are those of a run by one process.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, Popen
from tempfile import TemporaryDirectory

from prunekit.cli.app import EXIT_FAILED, MESSAGES, check_at_least
from prunekit.cli.signals import SIGNALS
from prunekit.config.run_config import Config, StructuredConfig, SweepConfig
from prunekit.distributed.heartbeat import LAUNCHER
from prunekit.distributed.join import LISTENER, VARIABLES
from prunekit.errors import ConfigError

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.05
COMMAND = (sys.executable, "-P", "-m", "prunekit")
"""Command of each rank; the current folder is imported from only if this process does so."""
LAST_SECONDS = 60.0
"""Time after the end of one rank in which the others have to end, before they are killed."""


def check_can_launch(count: int, config: Config | StructuredConfig | SweepConfig) -> None:
    """Check that this machine can share a run among so many processes.

    Raises:
        ConfigError: A launcher started this process, the config is a sweep or names one GPU, or
            there are fewer GPUs.
    """
    check_at_least(1, "--gpus", count)
    device = config.model.device
    if started := [name for name in VARIABLES[:2] if name in os.environ]:
        raise ConfigError(
            f"--gpus {count}: {started[0]} is set, so that this process is one of those that a "
            "launcher, such as torchrun, has started. Use either --gpus or the launcher."
        )
    if count > 1 and isinstance(config, SweepConfig):
        raise ConfigError(
            f"--gpus {count}: the runs of a sweep are one process each. Leave it out."
        )
    if count > 1 and ":" in device:
        raise ConfigError(
            f'--gpus {count}: model.device is "{device}", which is one GPU. Write "cuda" or "auto":'
            " each process then uses its own."
        )
    if device == "cpu":
        return
    import torch

    if count > (found := torch.cuda.device_count()):
        raise ConfigError(
            f"--gpus {count}: torch can use {found or 'no'} GPU{'s' * (found != 1)} of this "
            "machine. To start processes on its CPU: --set model.device=cpu."
        )


def launched_ranks() -> int | None:
    """Return the number of ranks if :func:`launch` started this process, else None."""
    return int(os.environ["WORLD_SIZE"]) if LAUNCHER in os.environ else None


def launch(count: int, arguments: Sequence[str]) -> int:
    """Carry out a command by several ranks; return its exit code.

    Signals are passed on to each rank once. Output of the ranks is that of this process; an error
    that several have is printed once.

    Args:
        count: Number of ranks.
        arguments: The command and its arguments.
    """
    ranks: list[Popen[bytes]] = []
    with TemporaryDirectory(prefix="prunekit-") as folder, _received() as received:
        try:
            _start(ranks, count, arguments, folder)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            _wait(ranks, received)
        finally:
            for rank in ranks:
                rank.kill()
        return _report(Path(folder), [rank.returncode for rank in ranks], received)


def _start(ranks: list[Popen[bytes]], count: int, arguments: Sequence[str], folder: str) -> None:
    """Start the ranks; rank 0 inherits an open socket to listen on."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        number = listener.fileno()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(listener.getsockname()[1]),
            LAUNCHER: str(os.getpid()),
            MESSAGES: folder,
        }
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                Popen(
                    [*COMMAND, *arguments],
                    env=environment | own | ({LISTENER: str(number)} if rank == 0 else {}),
                    stdin=DEVNULL,
                    pass_fds=[number] if rank == 0 else [],
                    # A group of its own, so that Ctrl-C of a terminal reaches this process alone.
                    process_group=0,
                )
            )


@contextmanager
def _received() -> Iterator[list[int]]:
    """Collect the numbers of signals instead of being stopped by them.

    They are blocked meanwhile, until the caller unblocks them. Processes that it starts inherit
    that, so that no signal reaches them before they can handle it.
    """
    received: list[int] = []
    handled = [each for each in SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in handled
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _wait(ranks: Sequence[Popen[bytes]], received: Sequence[int]) -> None:
    """Wait for all ranks; kill those that outlive another by long."""
    end, passed_on = float("inf"), 0
    while running := [rank for rank in ranks if rank.poll() is None]:
        if len(running) < len(ranks):
            end = min(end, time.monotonic() + LAST_SECONDS)
        latest = received[passed_on:]
        passed_on += len(latest)
        for rank in running:
            for number in latest:
                rank.send_signal(number)
            if time.monotonic() > end:
                rank.kill()
        time.sleep(POLL_SECONDS)


def _report(folder: Path, codes: Sequence[int], received: Sequence[int]) -> int:
    """Print each message once; return the exit code of the command."""
    messages: dict[str, list[int]] = {}
    for rank, code in enumerate(codes):
        if (file := folder / str(rank)).is_file():
            messages.setdefault(file.read_text(), []).append(rank)
        elif code < 0:
            messages[f"killed by {signal.Signals(-code).name}."] = [rank]
    for text, ranks in messages.items():
        # The other ranks quote the message of the one that failed.
        if not any(text in other for other in messages if other != text):
            sys.stderr.write(f"{text}\n" if 0 in ranks else f"Rank {ranks[0]}: {text}\n")
    by_signal = {-number: 128 + number for number in received}
    return max(by_signal.get(code, EXIT_FAILED) if code < 0 else code for code in codes)
