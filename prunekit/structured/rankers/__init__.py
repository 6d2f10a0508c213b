"""Rankers of units: one file each, registered by their ``name``."""

from prunekit.plugins import by_name
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

__all__ = ["GatedModel", "Ranker", "Scores", "rankers"]


def rankers() -> dict[str, type[Ranker]]:
    """Return every ranker class by name."""
    return by_name(__name__, Ranker, "prunekit.rankers")
