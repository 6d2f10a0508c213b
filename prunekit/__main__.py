"""``python -m prunekit`` is ``prunekit``."""

import os
import sys

from prunekit.cli.main import main as run


def main() -> None:
    """Carry out one command and end the process.

    Without taking the interpreter apart, which takes more than a second once torch is loaded: what
    has been written is on the disk by then.
    """
    code = run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
