"""A picture of a page with what it is drawn from, which can be had as CSV and as JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        title: What it shows.
        svg: The drawing; None where there is nothing to draw, as the caption then says.
        caption: How to read it.
        rows: What it is drawn from: flat rows with the same keys.
        alt: What kind of drawing it is, for those who cannot see it.
    """

    title: str
    svg: str | None
    caption: str
    rows: Sequence[dict[str, Any]] = field(default=())
    alt: str = "Heat map, blocks by linear layers"

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
        """Name of a file for them, without its ending."""
        return "-".join(self.title.lower().replace("/", " per ").split())


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as CSV, the keys of the first as its head."""
    if not rows:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
