"""Every method, allocation, pattern and other name that configs use."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from prunekit import architectures, patterns
from prunekit.allocations import allocations
from prunekit.allocations.schedules import SCHEDULES
from prunekit.checkpoint.formats import formats
from prunekit.config.plugin_field import summary
from prunekit.errors import ConfigError
from prunekit.formatting import did_you_mean
from prunekit.methods import methods
from prunekit.models.units.kinds import KINDS
from prunekit.structured.rankers import rankers

Entry = dict[str, Any]
"""``kind``, ``name``, ``meaning`` and, of classes with settings, ``settings``."""
RANKERS = f"method where pattern is {' or '.join(KINDS)}"


def catalogue() -> list[Entry]:
    """Return all names with their meanings and their settings with defaults."""
    spellings = [*patterns.spellings(), *(f'"{kind}"' for kind in KINDS)]
    return [
        *_classes("method", methods()),
        *_classes(RANKERS, rankers()),
        *_classes("allocation", allocations()),
        *(_entry("pattern", spelling) for spelling in spellings),
        *(_entry("format", name, summary(kind)) for name, kind in formats().items()),
        *(_entry("schedule", name, rule.__doc__) for name, rule in SCHEDULES.items()),
        *(_entry("architecture", name) for name in architectures.declared_model_types()),
    ]


def found(name: str) -> list[Entry]:
    """Return the entries of a name or a kind.

    Raises:
        ConfigError: There is none.
    """
    entries = catalogue()
    chosen = [each for each in entries if name in {each["name"].strip('"'), each["kind"]}]
    if not chosen:
        names = [each["name"].strip('"') for each in entries]
        kinds = dict.fromkeys(each["kind"] for each in entries if each["kind"] != RANKERS)
        raise ConfigError(
            f'list: nothing is called "{name}".{did_you_mean(name, names)} Kinds: '
            f"{', '.join(kinds)}."
        )
    return chosen


def as_table(entries: Iterable[Entry]) -> Table:
    """Return entries as a table to print, headed by kind."""
    table, kind = Table.grid("name", "meaning", padding=(0, 2, 0, 0)), None
    for entry in entries:
        if entry["kind"] != kind:
            if kind is not None:
                table.add_row()
            kind = entry["kind"]
            table.add_row(kind, style="bold")
        table.add_row(Text(f"  {entry['name']}"), Text(entry["meaning"]))
        for name, setting in entry.get("settings", {}).items():
            shown = f"{name} = {setting['default']!r}" if "default" in setting else "required"
            table.add_row("", Text(f"{shown}: {setting['meaning']}"))
    return table


def _classes(kind: str, classes: Mapping[str, type[BaseModel]]) -> Iterator[Entry]:
    for name, each in classes.items():
        settings = {
            setting: {
                **({} if field.is_required() else {"default": field.get_default()}),
                "meaning": _one_line(field.description),
            }
            for setting, field in each.model_fields.items()
        }
        yield _entry(kind, name, summary(each)) | {"settings": settings}


def _entry(kind: str, name: str, meaning: str | None = None) -> Entry:
    return {"kind": kind, "name": name, "meaning": _one_line(meaning)}


def _one_line(text: str | None) -> str:
    return " ".join((text or "").replace("``", "").split())
