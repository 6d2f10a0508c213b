"""Entry point of ``python -m prunekit``, the same as the command ``prunekit``."""

import os
import sys
import traceback

from prunekit.cli.app import EXIT_FAILED, MESSAGES, report_error
from prunekit.cli.main import main as run
from prunekit.cli.streams import guard_streams
from prunekit.errors import PrunekitError


def main() -> None:
    """Run one command and exit the process.

    Skips the interpreter's shutdown, which takes more than a second once torch is loaded. All
    output files are flushed to disk before this point.
    """
    guard_streams()
    try:
        code = run()
    except Exception:
        if MESSAGES not in os.environ:
            raise
        code = report_error(EXIT_FAILED, traceback.format_exc().rstrip())
    try:
        sys.stdout.flush()
    except PrunekitError as error:
        code = report_error(EXIT_FAILED, error)
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
