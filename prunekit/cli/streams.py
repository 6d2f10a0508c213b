"""Standard streams that are closed, full, or cannot encode a text."""

import os
import sys
from typing import Any, TextIO, cast

from prunekit.errors import PrunekitError


def guard_streams() -> None:
    """Make the standard streams of this process safe to write to.

    A closed one is opened on the null device, for reading only, so that it is still an error to
    write to it: the next opened file would take its number, and output would end up in a
    checkpoint. Characters that the encoding lacks are shown escaped. A failure to write to standard
    output is an error of ours; one to write to standard error ends the display, not the run.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
    sys.stdout = _guarded(sys.stdout, 1, fatal=True)
    sys.stderr = _guarded(sys.stderr, 2, fatal=False)


def _guarded(stream: TextIO | None, number: int, *, fatal: bool) -> TextIO:
    stream = stream or open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if reconfigure := getattr(stream, "reconfigure", None):
        reconfigure(errors="backslashreplace")
    return cast("TextIO", GuardedStream(stream, number, fatal=fatal))


class GuardedStream:
    """A text stream that fails once: later output is discarded.

    The first failure to write raises an error if it is ``fatal``, and is ignored otherwise.
    """

    def __init__(self, stream: TextIO, number: int, *, fatal: bool) -> None:
        self._stream, self._number, self._fatal = stream, number, fatal

    def write(self, text: str) -> int:
        """Write a text.

        Raises:
            PrunekitError: Nothing can be written, and the stream is standard output.
        """
        try:
            return self._stream.write(text)
        except OSError as error:
            return self._discard(error)

    def flush(self) -> None:
        """Write the buffered text; raises as ``write``."""
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stream, name)

    def _discard(self, error: OSError) -> int:
        """Redirect this stream to the null device, so that later writes succeed."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._number)
        os.close(null)
        self._stream.flush()
        if self._fatal:
            raise PrunekitError(f"standard output: cannot be written: {error.strerror}.") from None
        return 0
