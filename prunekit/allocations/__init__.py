"""Allocations of a sparsity budget to layers, one file per rule."""

from prunekit.allocations.base import Allocation, Survey
from prunekit.plugins import by_name

__all__ = ["Allocation", "Survey", "allocations"]


def allocations() -> dict[str, type[Allocation]]:
    """Return every allocation by name, including those of other distributions."""
    return by_name("prunekit.allocations", Allocation)
