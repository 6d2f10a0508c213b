"""Storage formats of pruned weights, one file per format."""

from prunekit.checkpoint.formats.base import QUANT_METHOD, Format, Parts, WeightLayout
from prunekit.errors import ConfigError
from prunekit.plugins import by_name

__all__ = ["QUANT_METHOD", "Format", "Parts", "WeightLayout", "format_named", "formats"]


def formats() -> dict[str, type[Format]]:
    """Return all formats by name."""
    return by_name(__name__, Format, "prunekit.formats")


def format_named(name: str) -> Format:
    """Return an instance of the format with this name.

    Raises:
        ConfigError: No format has this name.
    """
    if name not in formats():
        raise ConfigError(f'"{name}" is not a format. Choose: {", ".join(formats())}.')
    return formats()[name]()
