"""Python scripts that run in a fresh process."""

import os
import subprocess
import sys

from tests.conftest import ROOT


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a subprocess with prunekit importable, which has imported nothing yet."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
