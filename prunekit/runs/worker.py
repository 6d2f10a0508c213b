"""Runs a generator in a worker process with its own peak memory.

The worker is forked from a server process that has imported the modules it needs and done nothing
else, so it starts at once.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any

from prunekit.errors import PrunekitError
from prunekit.models.memory import limit_threads

PRELOADED = ["prunekit.runs.jobs", "prunekit.runs.sweep.measure"]
"""Modules that the fork server imports; it skips names that it cannot import."""


class Worker:
    """A process that runs a generator and sends its items.

    Args:
        function: Returns the generator; it, its arguments and its items are pickled.
        arguments: Arguments of the function.
        variables: Variables of the environment that it sees.
    """

    def __init__(
        self,
        function: Callable[..., Iterator[Any]],
        *arguments: object,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.receiver, sender = context.Pipe(duplex=False)
        given = (sender, function, arguments, dict(variables or {}))
        self.process = context.Process(target=_serve, args=given, daemon=True)
        self.process.start()
        sender.close()

    def receive(self) -> tuple[bool, Any]:
        """Wait for an item; return whether all is done, and it.

        Raises:
            PrunekitError: The function raised it, or the process was killed.
            RuntimeError: The function raised anything else; the message is its traceback.
        """
        try:
            kind, value = self.receiver.recv()
        except EOFError:
            self.process.join()
            raise PrunekitError(
                "The process that carried it out ended with exit code "
                f"{self.process.exitcode}; -9 says that it was killed, most likely for want of "
                "memory."
            ) from None
        if kind == "refused":
            raise value
        if kind == "failed":
            raise RuntimeError(value)
        return kind == "done", value

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.join()
        self.receiver.close()


def run_in_subprocess(function: Callable[..., Iterator[Any]], *arguments: object) -> Iterator[Any]:
    """Yield the items of ``function(*arguments)``, which runs in a worker process.

    Closing this generator ends the worker, and so does the end of this process, so that it does not
    hold a folder that is to be resumed.

    Raises:
        PrunekitError: The function raised it, or the worker was killed.
        RuntimeError: The function raised anything else; the message is its traceback.
    """
    worker = Worker(function, *arguments)
    try:
        while True:
            done, value = worker.receive()
            if done:
                return
            yield value
    finally:
        worker.close()


def _serve(
    sender: Connection,
    function: Callable[..., Iterator[Any]],
    arguments: tuple[object, ...],
    variables: Mapping[str, str],
) -> None:
    os.environ.update(variables)
    limit_threads()
    # A signal to all processes of a terminal is for the parent, which ends this one.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        for value in function(*arguments):
            sender.send(("value", value))
        sender.send(("done", None))
    except PrunekitError as error:
        sender.send(("refused", error))
    except Exception:
        sender.send(("failed", traceback.format_exc()))


def _end_with_parent() -> None:
    """Wait for the end of the parent, then end this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
