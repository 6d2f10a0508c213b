"""Plots of how near each contestant comes to the machine's roof.

Across: operations a byte of the work. Up: bytes of it a second. The roof is the bandwidth of a
copy, and right of its knee the rate of matrix products divided by the operations a byte.
"""

import json
from pathlib import Path

NO_PRODUCTS = 0.1  # intensity at which work without matrix products is drawn


def draw(folder: Path) -> Path:
    """Draw all results of a machine, one panel per operation.

    Returns:
        The picture's file.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    found = results(folder)
    across = min(3, len(found))
    down = -(-len(found) // across)
    figure, panels = plt.subplots(down, across, figsize=(5 * across, 4 * down), squeeze=False)
    for panel in panels.flat[len(found) :]:
        panel.set_axis_off()
    for panel, (op, result) in zip(panels.flat, found.items(), strict=False):
        _panel(panel, op, result)
    file = folder / "roofline.png"
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
    return file


def results(folder: Path) -> dict[str, dict]:
    """Return the results of each operation in a machine's folder."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    return {op: result for op, result in found.items() if _is_ours(result)}


def _is_ours(result: object) -> bool:
    machine = result.get("machine") if isinstance(result, dict) else None
    return isinstance(machine, dict) and "copy_bytes_per_second" in machine


def _panel(panel, op: str, result: dict) -> None:  # noqa: ANN001  matplotlib's axes
    machine, rows = result["machine"], result["rows"]
    copy = machine["copy_bytes_per_second"]
    marks = dict(zip(dict.fromkeys(row["contestant"] for row in rows), "osD^v<>P*X", strict=False))
    for contestant, mark in marks.items():
        own = [row for row in rows if row["contestant"] == contestant]
        panel.plot(
            [_intensity(row) for row in own],
            [row["bytes_per_second"] for row in own],
            mark,
            label=contestant,
            alpha=0.7,
        )
    furthest = max(10.0, *(2 * _intensity(row) for row in rows))
    points = [NO_PRODUCTS / 2 * (2 * furthest / NO_PRODUCTS) ** (step / 60) for step in range(61)]
    for rate in machine["product_flops_per_second"].values() or [float("inf")]:
        panel.plot(points, [min(copy, rate / point) for point in points], "k-", linewidth=1)
    panel.set(xscale="log", yscale="log", title=op, xlabel="operations / byte", ylabel="bytes / s")
    panel.legend(fontsize=7)


def _intensity(row: dict) -> float:
    return row["flops_per_second"] / row["bytes_per_second"] or NO_PRODUCTS
