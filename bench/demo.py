"""The demo on a fresh machine: create ``.venv``, prune, compare.

``python3 bench/demo.py`` needs Python and pip, nothing else, and prunes a real language model.
``--here`` uses the Python that runs it, unchanged; other arguments are passed to ``prunekit demo``.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that bench is found

from bench.harness import environment


def main(arguments: list[str]) -> int:
    """Run ``prunekit demo`` and return its exit code."""
    here = "--here" in arguments
    rest = [argument for argument in arguments if argument != "--here"]
    try:
        interpreter = sys.executable if here else environment.python("demo")
    except environment.SetupError as error:
        print(error, file=sys.stderr)
        return 1
    path = os.pathsep.join([str(environment.ROOT), str(environment.ROOT / "kernels")])
    command = [str(interpreter), "-m", "prunekit", "demo", *rest]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path}, check=False
    ).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
