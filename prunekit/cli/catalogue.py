"""What a config can name: methods, allocations, patterns, schedules, architectures."""

from collections.abc import Iterator, Mapping

from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from prunekit import architectures, patterns
from prunekit.allocations import allocations
from prunekit.allocations.schedules import SCHEDULES
from prunekit.checkpoint.formats import formats
from prunekit.config.plugin_field import summary
from prunekit.methods import methods
from prunekit.models.units.kinds import KINDS
from prunekit.structured.rankers import rankers

Row = tuple[str, str]


def catalogue() -> Table:
    """Return all names with what they mean, and the settings of each with their defaults."""
    table = Table.grid("name", "meaning", padding=(0, 2, 0, 0))
    for title, rows in _sections():
        table.add_row(title, style="bold")
        for name, meaning in rows:
            table.add_row(Text(f"  {name}"), Text(meaning))
        table.add_row()
    return table


def _sections() -> Iterator[tuple[str, list[Row]]]:
    yield "method", [*_kinds(methods())]
    yield f"method where pattern is {' or '.join(KINDS)}", [*_kinds(rankers())]
    yield "allocation", [*_kinds(allocations())]
    spellings = [*patterns.spellings(), *(f'"{kind}"' for kind in KINDS)]
    yield "pattern", [(spelling, "") for spelling in spellings]
    yield "format", [(name, _plain(summary(kind))) for name, kind in formats().items()]
    yield "schedule", [(name, _plain(rule.__doc__)) for name, rule in SCHEDULES.items()]
    yield "architecture", [("", ", ".join(architectures.names()))]


def _kinds(kinds: Mapping[str, type[BaseModel]]) -> Iterator[Row]:
    for name, kind in kinds.items():
        yield name, _plain(summary(kind))
        for setting, field in kind.model_fields.items():
            default = "required" if field.is_required() else f"{setting} = {field.default!r}"
            yield "", f"{default}: {_plain(field.description)}"


def _plain(text: str | None) -> str:
    return " ".join((text or "").replace("``", "").split())
