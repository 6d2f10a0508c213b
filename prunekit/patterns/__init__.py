"""Which zeros are allowed: one file a kind of pattern."""

from prunekit.errors import ConfigError
from prunekit.patterns.base import Grouped, Pattern, Scope, pruned_count
from prunekit.plugins import subclasses

__all__ = ["Grouped", "Pattern", "Scope", "parse", "pruned_count", "spellings"]


def spellings() -> list[str]:
    """Return how each kind of pattern is written in a config."""
    return [kind.spelling for kind in subclasses("prunekit.patterns", Pattern)]


def parse(text: str, scope: Scope = "row") -> Pattern:
    """Return the pattern that ``text`` spells.

    Raises:
        ConfigError: No kind of pattern is spelled so.
    """
    for kind in subclasses("prunekit.patterns", Pattern):
        if found := kind.parse(text, scope):
            return found
    raise ConfigError(f'"{text}" is not a pattern. Choose: {"; ".join(spellings())}.')
