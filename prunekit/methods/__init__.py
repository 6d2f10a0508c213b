"""How weights are chosen and changed: one file a paper."""

from prunekit.discovery import by_name
from prunekit.methods.base import Method, Propagation, Scored

__all__ = ["Method", "Propagation", "Scored", "methods"]


def methods() -> dict[str, type[Method]]:
    """Return every method by its name, those of other distributions included."""
    return by_name("prunekit.methods", Method)
