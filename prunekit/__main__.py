"""Entry point of ``python -m prunekit``, the same as the command ``prunekit``."""

import os
import sys

from prunekit.cli.main import main as run


def main() -> None:
    """Run one command and exit the process.

    Skips the interpreter's shutdown, which takes more than a second once torch is loaded. All
    output files are flushed to disk before this point.
    """
    code = run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
