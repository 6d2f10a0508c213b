"""``python -m prunekit`` is ``prunekit``."""

import sys

from prunekit.cli import main

if __name__ == "__main__":
    sys.exit(main())
