"""Heat maps of layers: blocks (rows) by linears (columns)."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from prunekit import formatting
from prunekit.reports.figures.draw import Cell, Grid, Scale, draw, value_range


def grid(layers: Sequence[dict[str, Any]], key: str, show: Callable[[Any], str]) -> Grid:
    """Arrange a value of each layer by block and linear.

    Linears of a block that differ only in numbers (experts) share a cell with their mean.

    Args:
        layers: Entries of a report, each with its ``name``.
        key: Key of the value; None or absent where it was not measured.
        show: Formats a value for the tooltip.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for layer in layers:
        groups.setdefault(split(layer["name"]), []).append(layer)
    blocks, linears = (list(dict.fromkeys(part)) for part in zip(*groups, strict=True))
    cells = []
    for (block, linear), group in groups.items():
        value = _mean([layer.get(key) for layer in group])
        name = group[0]["name"] if len(group) == 1 else f"{block}.{linear}, mean of {len(group)}"
        tip = f"{name}: {'not measured' if value is None else show(value)}"
        cells.append(Cell(blocks.index(block), linears.index(linear), value, tip))
    return Grid(block_labels(blocks), linear_labels(linears), cells)


def sparsity_map(layers: Sequence[dict[str, Any]]) -> str:
    """Return the heat map of sparsity as SVG, on a linear scale."""
    from matplotlib.colors import Normalize
    from matplotlib.ticker import PercentFormatter

    cells = grid(layers, "sparsity", formatting.percent)
    low, high = value_range(cells) or (0.0, 1.0)
    # At least ten points wide, so that rounding does not look like a difference.
    centre, half = (low + high) / 2, max(high - low, 0.1) / 2
    norm = Normalize(max(0, centre - half), min(1, centre + half))
    return draw(cells, Scale("sparsity", "viridis", norm, PercentFormatter(1, 0, " %")))


def error_map(layers: Sequence[dict[str, Any]]) -> str | None:
    """Return the heat map of relative errors as SVG, if any.

    The scale is logarithmic.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator

    cells = grid(layers, "relative_error", formatting.number)
    limits = value_range(cells, above=0.0)
    if limits is None:
        return None
    low, high = limits
    # At least a factor of two wide: a narrower scale has no tick to read.
    middle, half = math.sqrt(low * high), max(math.sqrt(high / low), math.sqrt(2))
    norm = LogNorm(middle / half, middle * half, clip=True)
    ticks = LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,))
    write = FuncFormatter(lambda x, _: f"{x:.2g}")
    return draw(cells, Scale("relative error (log scale)", "plasma", norm, write, ticks))


def split(name: str) -> tuple[str, str]:
    """Split a name into block and linear.

    ``layers.3.mlp.experts.7.up`` becomes ``layers.3`` and ``mlp.experts.*.up``.
    """
    match = re.match(r"(.*?(?:^|\.)\d+)\.(.+)", name)
    block, linear = match.groups() if match else ("", name)
    return block, re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", linear)


def _mean(values: list[float | str | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def block_labels(blocks: list[str]) -> list[str]:
    """Return block labels: "0", or "encoder 0" with several stacks."""
    stacks = {block.rpartition(".")[0] for block in blocks}
    shared = set.intersection(*(set(stack.split(".")) for stack in stacks))
    return [" ".join(part for part in block.split(".") if part not in shared) for block in blocks]


def linear_labels(linears: list[str]) -> list[str]:
    """Return the shortest suffixes of the names that are all different."""
    for parts in range(1, max(linear.count(".") for linear in linears) + 2):
        labels = [".".join(linear.split(".")[-parts:]) for linear in linears]
        if len(set(labels)) == len(labels):
            return labels
    return linears
