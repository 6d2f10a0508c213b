"""The command ``docs``: pages of the documentation, shipped with the package."""

import difflib
import sys
from importlib.resources import files
from importlib.resources.abc import Traversable

from prunekit.cli.app import app, print_line, print_table
from prunekit.errors import ConfigError

TITLE = "# "


def pages() -> dict[str, Traversable]:
    """Return the pages by topic, in alphabetical order."""
    found = files("prunekit").joinpath("docs").iterdir()
    markdown = {page.name.removesuffix(".md"): page for page in found if page.name.endswith(".md")}
    return dict(sorted(markdown.items()))


@app.command
def docs(topic: str | None = None, /) -> None:
    """List the pages of the documentation, or show one.

    Args:
        topic: Name of a page; without it the names and titles are listed.
    """
    known = pages()
    if topic is None:
        for name, page in known.items():
            title = page.read_text("utf-8").splitlines()[0].removeprefix(TITLE)
            print_line(f"{name:{max(map(len, known))}}  {title}")
        return
    if topic not in known:
        near = difflib.get_close_matches(topic, known, 1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"docs {topic}: no such page.{meant} There are {', '.join(known)}.")
    text = known[topic].read_text("utf-8")
    if sys.stdout.isatty():
        from rich.markdown import Markdown

        print_table(Markdown(text))
    else:
        print_line(text.rstrip("\n"))
