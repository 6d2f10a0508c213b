"""Python in a subprocess."""

import os
import subprocess
import sys
from pathlib import Path

import prunekit


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a subprocess that imports this checkout of prunekit."""
    environment = os.environ | {"PYTHONPATH": str(Path(prunekit.__file__).parents[1])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
