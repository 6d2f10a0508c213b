"""Heat maps of matrices: tokens by tokens, rankers by rankers."""

from collections.abc import Sequence
from dataclasses import dataclass

from prunekit import formatting
from prunekit.reports.figures.draw import Cell, Grid, Scale, draw
from prunekit.reports.figures.picture import Picture


@dataclass(frozen=True)
class Matrix:
    """A matrix with its labels.

    Attributes:
        quantity: Name of a value.
        values: The rows of the matrix; None is left out.
        axes: Names of the row axis and of the column axis.
        rows: Labels of the rows.
        columns: Labels of the columns.
        corner: Label above those of the rows.
        bounds: Values at the ends of the color scale.
        named: The data identifies rows by their labels, and columns too if both have the same
            labels; otherwise by their numbers.
    """

    quantity: str
    values: Sequence[Sequence[float | None]]
    axes: tuple[str, str]
    rows: list[str]
    columns: list[str]
    corner: str
    bounds: tuple[float, float] = (0.0, 1.0)
    named: bool = False


def picture(title: str, matrix: Matrix, caption: str, salt: str) -> Picture:
    """Return the heat map of a matrix.

    Args:
        title: Title of the figure.
        matrix: The matrix.
        caption: How to read it.
        salt: Makes the ids of the SVG different from those of other figures of the page.
    """
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter

    known = [
        (row, column, value)
        for row, line in enumerate(matrix.values)
        for column, value in enumerate(line)
        if value is not None
    ]
    cells = [
        Cell(
            row,
            column,
            value,
            f"{matrix.rows[row]} → {matrix.columns[column]}: {formatting.number(value)}",
        )
        for row, column, value in known
    ]
    first = matrix.rows if matrix.named else range(len(matrix.rows))
    same = matrix.named and matrix.rows == matrix.columns
    second = matrix.columns if same else range(len(matrix.columns))
    grid = Grid(matrix.rows, matrix.columns, cells, matrix.corner, square=True)
    scale = Scale(
        matrix.quantity,
        "viridis",
        Normalize(*matrix.bounds),
        FuncFormatter(lambda x, _: f"{x:.2g}"),
    )
    return Picture(
        title,
        draw(grid, scale, salt=salt),
        caption,
        [
            {matrix.axes[0]: first[row], matrix.axes[1]: second[column], matrix.quantity: value}
            for row, column, value in known
        ],
        f"Heat map, {matrix.axes[0]} by {matrix.axes[1]}",
    )
