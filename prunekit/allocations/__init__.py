"""How a sparsity budget is spread over layers: one file a rule."""

from prunekit.allocations.base import Allocation, Survey
from prunekit.plugins import by_name

__all__ = ["Allocation", "Survey", "allocations"]


def allocations() -> dict[str, type[Allocation]]:
    """Return every allocation by its name, those of other distributions included."""
    return by_name("prunekit.allocations", Allocation)
