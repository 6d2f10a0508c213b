"""Configs of structured runs on tiny checkpoints, planned and executed."""

import json
from pathlib import Path
from typing import Any

from prunekit.cli.main import main
from prunekit.config.load import load_config
from prunekit.config.run_config import StructuredConfig
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.planner import plan

BASE = """\
[model]
path = "{model}"
device = "cpu"
[calibration]
data = "{text}/text.txt"
samples = 8
length = 12
[prune]
{prune}
[output]
path = "{output}"
"""
EVALUATE = '[evaluate]\ndata = "{text}/text.txt"\nlength = 12\nwindows = 4\n'
BOTH = 'method = "obs"\npattern = ["neurons", "heads"]\nsparsity = 0.5'


def write_config(
    folder: Path, output: Path, prune: str, *, evaluate: bool = True, text: Path | None = None
) -> Path:
    """Write a config next to ``output`` and return its path.

    Args:
        folder: Checkpoint with a ``text.txt``.
        output: Output folder of the run.
        prune: Content of the [prune] table.
        evaluate: Whether the config has an [evaluate] table.
        text: Folder with the ``text.txt``; by default that of the checkpoint.
    """
    template = BASE + (EVALUATE if evaluate else "")
    path = output.with_suffix(".toml")
    given = {"model": folder, "text": text or folder, "output": output, "prune": prune}
    path.write_text(template.format(**given))
    return path


def planned(folder: Path, output: Path, prune: str, **options: Any) -> StructuredPlan:
    """Return the plan of a config; arguments as in :func:`write_config`."""
    config = load_config(write_config(folder, output, prune, **options))
    assert isinstance(config, StructuredConfig)
    return plan(config)


def finished(folder: Path, output: Path, prune: str, **options: Any) -> dict[str, Any]:
    """Execute a config through the command line and return its report."""
    path = write_config(folder, output, prune, **options)
    assert main(["run", str(path), "--quiet"]) == 0
    return json.loads((output / "report.json").read_text())
