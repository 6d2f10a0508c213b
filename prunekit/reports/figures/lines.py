"""Draws curves as inline SVG in the page's colors."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunekit.reports.figures.draw import INK, PIXELS_PER_INCH, STYLE, inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW_POINTS = 40
"""Points of a curve whose dots do not touch each other."""


@dataclass(frozen=True)
class Curve:
    """A line with a tooltip at each of its points.

    Attributes:
        colour: Its color.
        points: Its points.
        tips: Tooltip of each point.
        dots: Draw the points, large where there are few, and their tooltips.
        stairs: Hold each value up to the next point.
        band: Draw a wide, pale line, which another on top of it does not hide.
        spread: Deviation of each point over several runs, drawn as an area; empty for none.
    """

    colour: str
    points: Sequence[tuple[float, float | None]]
    tips: Sequence[str]
    dots: bool = True
    stairs: bool = False
    band: bool = False
    spread: Sequence[float | None] = ()


@dataclass(frozen=True)
class Axis:
    """Axes of a figure of curves.

    Attributes:
        label: Label of the value axis.
        write: Formats a value.
        wide: The value axis need not start at 0, and is logarithmic if the values span more than a
            power of ten.
        steps: The horizontal axis counts training steps instead of the removed fraction.
        salt: Makes the ids of the SVG different from those of other figures of the page.
    """

    label: str
    write: Callable[[Any], str]
    wide: bool = False
    steps: bool = False
    salt: str = ""


def curves(lines: Sequence[Curve], dense: float | None, over: Axis) -> str:
    """Return curves as SVG.

    Args:
        lines: The curves.
        dense: Value of the dense model, drawn as a dashed line; None for no line.
        over: The axes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    values = [value for line in lines for _, value in line.points] + [dense]
    known = [value for value in values if value is not None and math.isfinite(value)]
    with mpl.rc_context({**STYLE, "svg.hashsalt": f"curves {over.salt}"}):
        figure = Figure((320 / PIXELS_PER_INCH, 230 / PIXELS_PER_INCH), PIXELS_PER_INCH)
        axes = figure.add_axes((0.26, 0.18, 0.7, 0.78))
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.8)
        if over.wide and known and min(known) > 0 and max(known) > 10 * min(known):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y, over.write)))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        if not over.steps:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
        axes.set(xlabel="steps" if over.steps else "removed", ylabel=over.label)
        if dense is not None:
            axes.axhline(dense, color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6)
        tips: list[str] = []
        for line in lines:
            _plot(axes, line, tips)
        if not over.wide:
            # An axis from zero shows differences in their true proportion.
            axes.set_ylim(bottom=0, top=1.08 * max([*known, *_tops(lines)], default=1) or 1)
        return inline(figure, tips)


def _tops(lines: Sequence[Curve]) -> Iterator[float]:
    """Yield the upper ends of the areas of deviation."""
    for line in lines:
        for (_, value), deviation in zip(line.points, line.spread, strict=False):
            if value is not None and math.isfinite(value):
                yield value + (deviation or 0.0)


def _plot(axes: "Axes", line: Curve, tips: list[str]) -> None:
    """Draw a curve, and add the tooltips of its dots to ``tips``."""
    points = [(x, math.nan if y is None or not math.isfinite(y) else y) for x, y in line.points]
    width, alpha = (6.0, 0.45) if line.band else (1.8, 1.0)
    style = "steps-post" if line.stairs else "default"
    axes.plot(
        *zip(*points, strict=True),
        color=line.colour,
        linewidth=width,
        alpha=alpha,
        drawstyle=style,
    )
    if any(line.spread):
        around = [
            (x, y, deviation or 0.0) for (x, y), deviation in zip(points, line.spread, strict=True)
        ]
        places, low, high = zip(*((x, y - d, y + d) for x, y, d in around), strict=True)
        if axes.get_yscale() == "log":  # no line of the area may lead to zero
            low = [max(value, y / 10) for value, (_, y, _) in zip(low, around, strict=True)]
        axes.fill_between(places, low, high, color=line.colour, alpha=0.2, linewidth=0)
    size = 5 if len(points) <= FEW_POINTS else 2.5
    for (x, y), tip in zip(points, line.tips if line.dots else (), strict=line.dots):
        gid = f"cell{len(tips)}"
        axes.plot([x], [y], "o", color=line.colour, markersize=size, gid=gid, clip_on=False)
        tips.append(tip)


def _tick(value: float, write: Callable[[Any], str]) -> str:
    """Return a tick label without needless decimals."""
    text = write(value)
    return f"{value:g}" if re.fullmatch(r"0|\d*\.\d+(e[-+]\d+)?", text) else text
