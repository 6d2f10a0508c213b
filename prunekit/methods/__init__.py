"""Pruning methods, one file per paper."""

from prunekit.methods.base import Method, Propagation, Scored
from prunekit.plugins import by_name

__all__ = ["Method", "Propagation", "Scored", "methods"]


def methods() -> dict[str, type[Method]]:
    """Return every method by name, including those of other distributions."""
    return by_name("prunekit.methods", Method)
