"""Signals that ask a command to stop.

They come from Ctrl-C, from schedulers, and when a terminal is closed.
"""

import os
import signal
from contextlib import suppress
from threading import current_thread, main_thread
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENT = b"Stopping after the current block or step; the same signal again stops at once.\n"


class StopSignals:
    """Context in which all three signals stop the run.

    A signal raises KeyboardInterrupt, so that a command can clean up. While ``patient``, the first
    of each kind only makes ``requested`` True.

    Attributes:
        patient: The command calls ``requested`` regularly.
        received: Numbers of the signals so far.
    """

    def __init__(self) -> None:
        self.patient = False
        self.received: list[int] = []
        self._before: dict[int, object] = {}

    def requested(self) -> bool:
        """Return whether a signal was received."""
        return bool(self.received)

    @property
    def exit_code(self) -> int:
        """Exit code of a process that the first received signal ended.

        Without a received signal it is that of Ctrl-C.
        """
        return 128 + (self.received or [signal.SIGINT])[0]

    def __enter__(self) -> Self:
        if current_thread() is main_thread():  # handlers can be set nowhere else
            for number in SIGNALS:
                # An ignored signal, as under nohup, remains ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # pyright: ignore
        self._before = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        again = number in self.received
        self.received.append(number)
        if again or not self.patient:
            raise KeyboardInterrupt
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # a stream may be in the middle of a write
                os.write(2, PATIENT)
