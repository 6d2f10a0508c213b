"""Table of every method, allocation, pattern and other name usable in configs."""

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
    """Return all names with their meanings and their settings with defaults."""
    table = Table.grid("name", "meaning", padding=(0, 2, 0, 0))
    for title, rows in _sections():
        table.add_row(title, style="bold")
        for name, meaning in rows:
            table.add_row(Text(f"  {name}"), Text(meaning))
        table.add_row()
    return table


def _sections() -> Iterator[tuple[str, list[Row]]]:
    yield "method", [*_class_rows(methods())]
    yield f"method where pattern is {' or '.join(KINDS)}", [*_class_rows(rankers())]
    yield "allocation", [*_class_rows(allocations())]
    spellings = [*patterns.spellings(), *(f'"{kind}"' for kind in KINDS)]
    yield "pattern", [(spelling, "") for spelling in spellings]
    yield "format", [(name, _one_line(summary(kind))) for name, kind in formats().items()]
    yield "schedule", [(name, _one_line(rule.__doc__)) for name, rule in SCHEDULES.items()]
    yield "architecture", [("", ", ".join(architectures.declared_model_types()))]


def _class_rows(kinds: Mapping[str, type[BaseModel]]) -> Iterator[Row]:
    for name, kind in kinds.items():
        yield name, _one_line(summary(kind))
        for setting, field in kind.model_fields.items():
            default = "required" if field.is_required() else f"{setting} = {field.default!r}"
            yield "", f"{default}: {_one_line(field.description)}"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").replace("``", "").split())
