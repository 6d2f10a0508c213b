"""Patterns of allowed zeros, one file per kind."""

from prunekit.errors import ConfigError
from prunekit.patterns.base import Grouped, Pattern, WeightScope, pruned_count
from prunekit.plugins import subclasses

__all__ = ["Grouped", "Pattern", "WeightScope", "parse", "pruned_count", "spellings"]


def spellings() -> list[str]:
    """Return the spelling of each kind of pattern in a config."""
    return [kind.spelling for kind in subclasses("prunekit.patterns", Pattern)]


def parse(text: str, scope: WeightScope = "row") -> Pattern:
    """Return the pattern with a given spelling.

    Args:
        text: The spelling, such as ``"2:4"``.
        scope: Group of weights that an unstructured pattern compares.

    Raises:
        ConfigError: No kind of pattern has this spelling, or its numbers are out of range.
    """
    for kind in subclasses("prunekit.patterns", Pattern):
        if found := kind.parse(text, scope):
            return found
    raise ConfigError(f'"{text}" is not a pattern. Choose: {"; ".join(spellings())}.')
