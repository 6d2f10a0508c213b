"""A figure of a report page, with its data."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Picture:
    """A figure with its caption and data.

    Attributes:
        title: Title of the figure.
        svg: The drawing; None if there is nothing to draw, which the caption then explains.
        caption: How to read the figure.
        rows: Its data, flat rows with the same keys.
        alt: Kind of the drawing, for screen readers.
        legend: Color and meaning of each line.
    """

    title: str
    svg: str | None
    caption: str
    rows: Sequence[dict[str, Any]] = field(default=())
    alt: str = "Heat map, blocks by linear layers"
    legend: Sequence[tuple[str, str]] = ()

    @property
    def csv(self) -> str:
        """The rows as CSV."""
        return as_csv(self.rows)

    @property
    def json(self) -> str:
        """The rows as JSON."""
        return json.dumps(self.rows, ensure_ascii=False)

    @property
    def file(self) -> str:
        """File name for the rows, without suffix."""
        return "-".join(self.title.lower().replace("/", " per ").split())


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as CSV; the first row's keys are the header."""
    if not rows:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
