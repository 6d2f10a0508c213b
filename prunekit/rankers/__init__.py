"""Rankers of units: one file each, found by their ``name``."""

from prunekit.discovery import by_name
from prunekit.rankers.base import Ranker, Scores, Subject

__all__ = ["Ranker", "Scores", "Subject", "rankers"]


def rankers() -> dict[str, type[Ranker]]:
    """Return every ranker by its name."""
    return by_name(__name__, Ranker)
