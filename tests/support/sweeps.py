"""Configs of sweeps over one tiny checkpoint."""

from pathlib import Path

BASE = """\
[model]
path = "{model}"
device = "cpu"
[calibration]
data = "{model}/text.txt"
samples = 4
length = 12
[prune]
pattern = "neurons"
{prune}
[sweep]
{sweep}
[evaluate]
data = "{model}/text.txt"
length = 12
windows = 2
[output]
path = "{output}"
"""
TWO_BY_TWO = 'method = ["obs", { name = "flap", standardised = false }]\nsparsity = [0.25, 0.5]\n'
"""Keys of the [sweep] table that define four runs."""


def write_sweep(folder: Path, output: Path, sweep: str, prune: str = "", text: str = BASE) -> Path:
    """Write a sweep config next to ``output`` and return its path.

    Args:
        folder: Checkpoint with a ``text.txt``.
        output: Output folder of the sweep.
        sweep: Content of the [sweep] table.
        prune: Additional content of the [prune] table.
        text: Config template with placeholders for the other arguments.
    """
    path = output.with_suffix(".toml")
    path.write_text(text.format(model=folder, output=output, sweep=sweep, prune=prune))
    return path
