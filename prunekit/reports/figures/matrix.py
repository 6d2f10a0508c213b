"""Heat maps of one thing by another: tokens by tokens, heads by tokens, methods by methods."""

from collections.abc import Sequence
from dataclasses import dataclass

from prunekit import formatting
from prunekit.reports.figures.draw import Cell, Grid, Scale, draw
from prunekit.reports.figures.picture import Picture


@dataclass(frozen=True)
class Matrix:
    """What is drawn.

    Attributes:
        what: What a value is.
        values: Row by row; None is left out.
        axes: What rows and columns are.
        rows: Their labels.
        columns: Likewise.
        corner: Above the labels of the rows.
        bounds: The values at the ends of the colours.
        named: In the data rows are called by their labels, columns too if the two are the same;
            otherwise both are numbers.
    """

    what: str
    values: Sequence[Sequence[float | None]]
    axes: tuple[str, str]
    rows: list[str]
    columns: list[str]
    corner: str
    bounds: tuple[float, float] = (0.0, 1.0)
    named: bool = False


def picture(title: str, shown: Matrix, caption: str, salt: str) -> Picture:
    """Return the picture; ``salt`` tells it from others of its kind on a page."""
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter

    known = [
        (row, column, value)
        for row, line in enumerate(shown.values)
        for column, value in enumerate(line)
        if value is not None
    ]
    cells = [
        Cell(
            row,
            column,
            value,
            f"{shown.rows[row]} → {shown.columns[column]}: {formatting.number(value)}",
        )
        for row, column, value in known
    ]
    first = shown.rows if shown.named else range(len(shown.rows))
    same = shown.named and shown.rows == shown.columns
    second = shown.columns if same else range(len(shown.columns))
    grid = Grid(shown.rows, shown.columns, cells, shown.corner, square=True)
    scale = Scale(
        shown.what, "viridis", Normalize(*shown.bounds), FuncFormatter(lambda x, _: f"{x:.2g}")
    )
    return Picture(
        title,
        draw(grid, scale, salt=salt),
        caption,
        [
            {shown.axes[0]: first[row], shown.axes[1]: second[column], shown.what: value}
            for row, column, value in known
        ],
        f"Heat map, {shown.axes[0]} by {shown.axes[1]}",
    )
