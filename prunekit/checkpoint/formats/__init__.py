"""How a pruned weight is stored: one file a format."""

from prunekit.checkpoint.formats.base import METHOD, Format, Parts, Stored
from prunekit.errors import ConfigError
from prunekit.plugins import by_name

__all__ = ["METHOD", "Format", "Parts", "Stored", "format_named", "formats"]


def formats() -> dict[str, type[Format]]:
    """Return all formats by name."""
    return by_name(__name__, Format, "prunekit.formats")


def format_named(name: str) -> Format:
    """Return the format of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in formats():
        raise ConfigError(f'"{name}" is not a format. Choose: {", ".join(formats())}.')
    return formats()[name]()
