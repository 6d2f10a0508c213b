"""How a pruned weight is stored: one file a format."""

from prunekit.discovery import by_name
from prunekit.errors import ConfigError
from prunekit.formats.base import METHOD, Format, Parts, Stored

__all__ = ["METHOD", "Format", "Parts", "Stored", "format_named", "formats"]


def formats() -> dict[str, type[Format]]:
    """Return all formats by name."""
    return by_name("prunekit.formats", Format)


def format_named(name: str) -> Format:
    """Return the format of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in formats():
        raise ConfigError(f'"{name}" is not a format. Choose: {", ".join(formats())}.')
    return formats()[name]()
