"""Runs a generator in a process of its own, whose peak memory is its own.

The process is a fork of a server that has imported what is needed and done nothing else, so that it
starts at once.
"""

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from prunekit.errors import PrunekitError

PRELOADED = ["prunekit.runs.jobs", "prunekit.runs.sweep.measure"]


def run_in_subprocess(function: Callable[..., Iterator[Any]], *given: object) -> Iterator[Any]:
    """Yield what ``function`` yields when it is called with ``given`` in another process.

    All of it has to pickle. Where nobody wants more, the process is ended.

    Raises:
        PrunekitError: As the function did, or because the process was killed.
        RuntimeError: Anything else went wrong there; with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, function, given), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            kind, value = ours.recv()
            if kind == "done":
                return
            if kind == "refused":
                raise value
            if kind == "failed":
                raise RuntimeError(value)
            yield value
    except EOFError:
        process.join()
        raise PrunekitError(
            f"The process that carried it out ended with exit code {process.exitcode}; -9 says "
            "that it was killed, most likely for want of memory."
        ) from None
    finally:
        process.terminate()
        process.join()


def _serve(
    pipe: Connection, function: Callable[..., Iterator[Any]], given: tuple[object, ...]
) -> None:
    try:
        for value in function(*given):
            pipe.send(("value", value))
        pipe.send(("done", None))
    except PrunekitError as error:
        pipe.send(("refused", error))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))
