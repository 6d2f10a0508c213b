"""Fork ranks from a process that has imported everything and never computes.

So a world of ranks starts in a tenth of a second. A stock one has imported all but prunekit, for
scripts that a user would start in a new process. Each line of its standard input requests one; it
writes the process ids at once, and the exit codes when all have ended. These processes are forked
themselves, from one that all workers of a test run share, so that transformers is imported once.
"""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

from tests.distributed.hosts import INTERFACE, Hosts, enter

ROOT = Path(__file__).parents[2]


class Origin:
    """The process that fork servers are forked from; it imports once it is asked for the first.

    Attributes:
        address: Socket that fork servers are asked for at.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp()
        self.address = f"{self._folder}/socket"
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(self.address)
            listening.listen()
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(listening.fileno())],
                stdin=subprocess.PIPE,  # ends with this process
                pass_fds=[listening.fileno()],
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self._folder)


class ForkServer:
    """The forking process, as used by a test."""

    def __init__(self, address: str, *, stock: bool = False) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._stream = self._socket.makefile("rw")
        self._write("stock" if stock else "prunekit")

    def start(
        self,
        folder: Path,
        size: int,
        script: str,
        *arguments: object,
        hosts: Hosts | None = None,
    ) -> "World":
        """Start ``size`` ranks that run ``script``, with output in ``folder``.

        The script's globals are ``rank``, ``arguments`` and ``code``, its exit code; None means 0.

        Args:
            folder: Gets standard output and error of each rank.
            size: Number of ranks.
            script: Source code.
            arguments: Become strings.
            hosts: Where the ranks are, in turn; all on this machine if left out.
        """
        folder.mkdir(parents=True, exist_ok=True)
        job = {"folder": str(folder), "size": size, "script": script}
        job["arguments"] = [*map(str, arguments)]
        if hosts:
            job["hosts"] = [*zip(hosts.namespaces, hosts.names, strict=True)]
            job["address"] = hosts.addresses[0]
        return World(self, folder, self.request(job))

    def request(self, job: object) -> list[int]:
        self._write(json.dumps(job))
        return self.read()

    def read(self) -> list[int]:
        return json.loads(self._stream.readline())

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class World:
    """Ranks that are running."""

    def __init__(self, fork_server: ForkServer, folder: Path, pids: list[int]) -> None:
        self._server, self.folder, self.pids = fork_server, folder, pids
        self.began = time.monotonic()

    def kill(self, rank: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def wait(self) -> list[int]:
        """Return the exit code of each rank; negative for a signal."""
        return self._server.read()

    def stderr(self, rank: int) -> str:
        """Return the standard error of a rank."""
        return (self.folder / f"{rank}.err").read_text()

    def stdout(self, rank: int) -> str:
        """Return the standard output of a rank."""
        return (self.folder / f"{rank}.out").read_text()

    def succeed(self) -> None:
        codes = self.wait()
        errors = [self.stderr(rank) for rank in range(len(codes))]
        assert not any(codes), f"{codes}\n" + "\n".join(errors)


def listen(listening: socket.socket) -> None:
    """Fork a server for each connection, until the standard input is closed."""
    while listening in select.select([listening, sys.stdin], [], [])[0]:
        connection, _ = listening.accept()
        _import_stock()
        if not os.fork():
            listening.close()
            for number in range(2):
                os.dup2(connection.fileno(), number)
            connection.close()
            serve()
            os._exit(0)
        connection.close()


def _import_stock() -> None:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401  both are lazy

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would let ranks ignore it


def serve() -> None:
    """Fork a world for each line of the standard input after the first."""
    if sys.stdin.readline() != "stock\n":
        _import_prunekit()
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = [_fork(rank, port, job) for rank in range(job["size"])]
        _write(pids)
        _write([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])


def _import_prunekit() -> None:
    from prunekit.cli import main, progress  # noqa: F401
    from prunekit.reports import report
    from prunekit.runs import jobs  # noqa: F401
    from tests.support import units  # noqa: F401

    report.render = lambda report: ""


def _write(numbers: list[int]) -> None:
    sys.stdout.write(json.dumps(numbers) + "\n")
    sys.stdout.flush()


def _fork(rank: int, port: int, job: dict) -> int:
    import torch

    if child := os.fork():
        return child
    # torch replaces its threads at their first use after a fork; two that do so at once collide.
    torch.set_num_threads(1)
    if job["size"] > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["size"]),
            "MASTER_ADDR": job.get("address", "127.0.0.1"),
            "MASTER_PORT": str(port),
        }
    if hosts := job.get("hosts"):
        enter(*hosts[rank % len(hosts)])
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # standard input has requests
    for number, ending in ((1, "out"), (2, "err")):
        name = f"{job['folder']}/{rank}.{ending}"
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    names = {"rank": rank, "arguments": job["arguments"], "code": None}
    try:
        exec(job["script"], names)
        code = names["code"] or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # which the script has closed
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    listen(socket.socket(fileno=int(sys.argv[1])))
