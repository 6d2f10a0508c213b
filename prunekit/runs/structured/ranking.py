"""TODO-DOC prunekit/runs/structured/ranking.py (out of prunekit/shrink_running.py)."""

import torch

from prunekit.models.units.heads_neurons import Site
from prunekit.structured.rankers import Scores

TRUTH_TOKENS = 512
"""Tokens of calibration that are read once a unit where the ranker is held against the truth."""


def _shared(sites: list[Site], scores: Scores) -> Scores:
    """Give heads of blocks that share a position bias one score, so that the same ones stay."""
    from prunekit.models.units.removal import biased

    groups: dict[str, list[str]] = {}
    for site in sites:
        if biased(site):
            groups.setdefault(site.stack.blocks, []).append(site.name)
    totals = {
        name: torch.stack(
            [scores[other] / scores[other].abs().sum().clamp_min(1e-300) for other in names]
        ).sum(0)
        for names in groups.values()
        for name in names
    }
    return scores | totals
