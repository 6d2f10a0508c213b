"""Draws heat maps as inline SVG in the page's colors."""

import html
import io
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter, Locator

# The layout is in CSS pixels, which are matplotlib's points at 72 per inch.
PIXELS_PER_INCH = 72
LETTER = 6.9  # mean width of a letter at 11 px in a wide sans serif (DejaVu)
GAP = 8
MARGIN = 2 * LETTER  # right of the color bar, whose last tick is centered on its end
BAR = 54  # height of the color bar with ticks and label
INK = "#012345"  # placeholder, replaced by the text color of the page
UNKNOWN = (0.5, 0.5, 0.5, 0.25)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Cell:
    """One square of a heat map.

    Attributes:
        row: Index of its row.
        column: Index of its column.
        value: Its value; None or NaN was not measured.
        tip: Its tooltip.
        frame: Color of a line around it; None for no line.
    """

    row: int
    column: int
    value: float | None
    tip: str
    frame: str | None = None


@dataclass(frozen=True)
class Grid:
    """A heat map: cells, with labels of rows and columns.

    Attributes:
        rows: Labels of the rows.
        columns: Labels of the columns.
        cells: The squares, in any order.
        corner: Label above those of the rows.
        square: Draw small squares, for many columns.
    """

    rows: list[str]
    columns: list[str]
    cells: list[Cell]
    corner: str = "block"
    square: bool = False


@dataclass(frozen=True)
class Scale:
    """Color scale of a heat map.

    Attributes:
        label: Label of the color bar.
        colours: Name of a matplotlib colormap.
        norm: Maps values to 0..1.
        write: Formats the ticks of the color bar.
        ticks: Places the ticks; None leaves it to matplotlib.
    """

    label: str
    colours: str
    norm: "Normalize"
    write: "Formatter"
    ticks: "Locator | None" = None


def value_range(cells: Grid, above: float = -math.inf) -> tuple[float, float] | None:
    """Return the lowest and highest finite value above a bound, if any."""
    known = [cell.value for cell in cells.cells if cell.value is not None]
    known = [value for value in known if math.isfinite(value) and value > above]
    return (min(known), max(known)) if known else None


def draw(cells: Grid, scale: Scale, salt: str = "") -> str:
    """Return a heat map as SVG.

    Args:
        cells: The cells and their labels.
        scale: The color scale.
        salt: Makes the ids different from those of other figures with this scale on the page.
    """
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    # The salt makes ids reproducible, and different from those of other figures.
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt + scale.label}):
        # 47 colors look smooth. The number is odd, so no border lies at the center, and below 50,
        # from which on matplotlib embeds the bar as a bitmap.
        palette = mpl.colormaps[scale.colours].resampled(47).with_extremes(bad=UNKNOWN)
        colours = ScalarMappable(scale.norm, palette)
        figure = Figure(dpi=PIXELS_PER_INCH)
        axes, bar_axes = _lay_out(figure, cells)
        _fill(axes, cells, colours)
        bar = figure.colorbar(
            colours, bar_axes, orientation="horizontal", format=scale.write, ticks=scale.ticks
        )
        bar.minorticks_off()
        bar.set_label(scale.label)
        bar.outline.set_visible(False)
        # Without edges of the same color, browsers show seams between the steps.
        assert bar.solids is not None
        bar.solids.set_edgecolor("face")
        return inline(figure, [cell.tip for cell in cells.cells])


def _lay_out(figure: "Figure", cells: Grid) -> tuple["Axes", "Axes"]:
    """Size the figure; return the axes of map and color bar.

    The size follows cells and labels, so that text has the same size in every report.
    """
    rows, columns = len(cells.rows), len(cells.columns)
    across, down = min(72, max(34, 238 / columns)), min(17, max(9, 700 / rows))
    if cells.square:
        across = down = min(26, max(12, 260 / columns))
    left = LETTER * max(map(len, [*cells.rows, cells.corner])) + GAP
    upright = across < 18  # slanted labels would overlap
    longest = LETTER * max(map(len, cells.columns))
    slanted = max(longest if upright else 0.72 * longest, 16) + GAP
    width = left + max(columns * across + (MARGIN if upright else slanted), 220)
    height = slanted + rows * down + 2 * GAP + BAR
    figure.set_size_inches(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH)

    def place(y: float, wide: float, high: float) -> "Axes":
        return figure.add_axes((left / width, y / height, wide / width, high / height))

    axes = place(BAR + 2 * GAP, columns * across, rows * down)
    every = math.ceil(13 / down)
    axes.set(xlim=(0, columns), ylim=(rows, 0), frame_on=False)
    axes.set_yticks([i + 0.5 for i in range(0, rows, every)], cells.rows[::every])
    axes.set_xticks([i + 0.5 for i in range(columns)], cells.columns)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False, pad=4)
    axes.text(-4 / across, -6 / down, cells.corner, ha="right")
    for text in axes.get_xticklabels():
        if upright:
            text.set(rotation=90)
        else:
            text.set(rotation=45, ha="left", rotation_mode="anchor")
    return axes, place(BAR - 2 * GAP, max(columns * across, 180), 10)


def _fill(axes: "Axes", cells: Grid, colours: "ScalarMappable") -> None:
    import numpy as np
    from matplotlib.patches import Rectangle

    values = [math.nan if cell.value is None else cell.value for cell in cells.cells]
    palette = colours.to_rgba(np.array(values))
    for index, (cell, colour) in enumerate(zip(cells.cells, palette, strict=True)):
        square = Rectangle((cell.column + 0.03, cell.row + 0.04), 0.94, 0.92, color=colour, lw=0)
        if cell.frame:
            square.set(edgecolor=cell.frame, linewidth=1.5)
        square.set(gid=f"cell{index}", clip_on=False)
        axes.add_patch(square)


def inline(figure: "Figure", tips: list[str]) -> str:
    """Return a figure as SVG with tooltips, in the page's colors."""
    file = io.StringIO()
    figure.savefig(
        file,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    svg = file.getvalue()
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg[svg.index("<svg") :], flags=re.S)
    width = math.ceil(figure.get_figwidth() * PIXELS_PER_INCH)
    size = f'style="min-width:{width}px;max-width:{1.5 * width:.0f}px"'
    svg = re.sub(r'<svg .*?(viewBox="[^"]*")[^>]*>', rf"<svg \1 {size}>", svg, count=1, flags=re.S)
    svg = re.sub(r' id="(?!cell|[mp][0-9a-f]+")[^"]*"', "", svg)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r">\s+<", "><", svg).replace(INK, "currentColor")
    return re.sub(
        r'<g id="cell(\d+)">',
        lambda match: f"<g><title>{html.escape(tips[int(match[1])])}</title>",
        svg,
    )
