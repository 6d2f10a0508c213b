"""The rich console of the command line, without markup."""

import sys
from collections.abc import Iterable
from typing import Any

from rich import console as rich
from rich.segment import Segment
from rich.text import Text

from prunekit.formatting import printable


class Console(rich.Console):
    """Console without markup: "[/b]" and ":x:" in a path are plain text.

    Control characters in a name, which could change the terminal's state, are shown escaped.
    """

    def render_str(self, text: str, **options: Any) -> Text:  # noqa: ANN401
        """Return a text before its width is measured, without control characters."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: rich.RenderableType, options: rich.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render an object as segments, without control characters."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def console(*, stderr: bool = False) -> Console:
    """Return the console of standard output, or of standard error."""
    # A pipe or file has no width of its own; 160 columns keep names from being cut.
    width = None if stderr or sys.stdout.isatty() else 160
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=width)
