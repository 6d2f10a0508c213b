"""What was measured of sparse layers, written: ``speed.json``, and ``speed.svg`` to look at."""

import json
import statistics
from pathlib import Path
from typing import Any

from prunekit.checkpoint import write_atomically
from prunekit.speed import Measured, Row

JSON, PLOT = "speed.json", "speed.svg"


def write(found: Measured, environment: dict[str, Any], folder: Path) -> list[Path]:
    """Write both files, and return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, **found.dump()}
    write_atomically(folder / JSON, json.dumps(content, indent=1).encode() + b"\n")
    write_atomically(folder / PLOT, plot(found).encode())
    return [folder / JSON, folder / PLOT]


def plot(found: Measured) -> str:
    """Return speed over dense against tokens, one line for each way, as SVG."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for way, speeds in speeds_over_dense(found.rows).items():
        axes.plot([*speeds], [*speeds.values()], marker="o", label=way)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="tokens at once (M)")
    axes.set(ylabel="speed, dense = 1", title=f"{found.device}, {found.dtype}")
    axes.legend(fontsize="small")
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    return stream.getvalue()


def speeds_over_dense(rows: list[Row]) -> dict[str, dict[int, float]]:
    """Return, for each way but dense, the geometric mean over layers for each number of tokens."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.way != "dense":
            found.setdefault(row.way, {}).setdefault(row.tokens, []).append(row.dense)
    return {
        way: {tokens: statistics.geometric_mean(speeds) for tokens, speeds in sorted(by_m.items())}
        for way, by_m in found.items()
    }
