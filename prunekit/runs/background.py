"""One job at a time in the background."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """A thread that does one job at a time, whose result is then collected.

    The error of a job is raised once, by whichever of :meth:`peek` and :meth:`result` comes first.

    Args:
        name: Name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._job: Future[T] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether there is a job whose result was not collected."""
        return self._job is not None

    def start(self, job: Callable[[], T]) -> None:
        """Start a job, once the result of the last one was collected."""
        assert self._job is None
        self._job = self._threads.submit(job)

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
        job, self._job = self._job, None
        return job.result()

    def close(self) -> None:
        """Wait for a job whose result nobody collects, and end the thread."""
        self._job = None
        self._threads.shutdown()
