"""One job at a time in the background."""

import sys
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")
PATIENCE = 2.0
"""Seconds for which an interrupted process waits for a job."""


class Background(Generic[T]):
    """Does one job at a time in a thread.

    The error of a job is raised once, by whichever of :meth:`peek` and :meth:`result` comes first.

    Args:
        name: Name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._job: Future[T] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether there is a job whose result was not collected."""
        return self._job is not None

    def start(self, job: Callable[[], T]) -> None:
        """Start a job, once the result of the last one was collected."""
        assert self._job is None
        future = self._job = Future[T]()

        def work() -> None:
            try:
                future.set_result(job())
            except BaseException as error:  # raised by whoever collects the result
                future.set_exception(error)

        try:
            Thread(target=work, name=self._name, daemon=True).start()
        except BaseException:
            self._job = None  # nobody does it
            raise

    def peek(self) -> T | None:
        """Return the result, to be collected, if it is there; None otherwise.

        Raises:
            BaseException: The job failed.
        """
        if self._job is None or not self._job.done():
            return None
        return self.result() if self._job.exception() else self._job.result()

    def result(self) -> T:
        """Wait for the job and collect its result.

        Raises:
            BaseException: The job failed.
        """
        assert self._job is not None
        try:
            return self._job.result()
        finally:
            if self._job.done():  # an interrupted wait leaves it to close()
                self._job = None

    def close(self, then: Callable[[], object]) -> None:
        """Wait for a job whose result nobody collects, then call a function.

        A process that was interrupted, or whose caller wants no more records, waits a moment only;
        if the job takes longer, and the process lives on, the function is called at its end.
        """
        job, self._job = self._job, None
        if job is None:
            then()
            return
        hasty = isinstance(sys.exception(), KeyboardInterrupt | GeneratorExit)
        try:
            wait([job], PATIENCE if hasty else None)
        finally:
            job.add_done_callback(lambda _: then())  # at once where it is done
