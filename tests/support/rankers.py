"""Calibration tokens and score helpers for tests of rankers."""

import torch

from prunekit.structured.gated_model import Scores

TOKENS = torch.randint(3, 96, (10, 12), generator=torch.Generator().manual_seed(3))


def flat(scores: Scores) -> torch.Tensor:
    """Return the scores of all groups as one vector."""
    return torch.cat([*scores.values()])
