"""How weights are chosen and changed: one file a paper."""

from prunekit.methods.base import Method, Propagation, Scored
from prunekit.plugins import by_name

__all__ = ["Method", "Propagation", "Scored", "methods"]


def methods() -> dict[str, type[Method]]:
    """Return every method by its name, those of other distributions included."""
    return by_name("prunekit.methods", Method)
