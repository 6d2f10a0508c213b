"""Agreement of two rankings, and similarity of the units of a layer.

Shapes: N units of all groups, U units of a group, I inputs of the linear that reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit.models.units.heads_neurons import LinearUnitGroup

if TYPE_CHECKING:
    from prunekit.structured.gated_model import Scores


def spearman(first: Scores, second: Scores) -> float:
    """Return Spearman's ρ, −1 to 1; 0 if a ranking is constant."""
    a, b = (
        normalized_ranks(torch.cat([scores[name] for name in first])) for scores in (first, second)
    )
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else 0.0


def normalized_ranks(scores: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the fraction of other scores that are lower, ties counted half."""
    ordered = scores.sort().values
    below = torch.searchsorted(ordered, scores)
    up_to = torch.searchsorted(ordered, scores, right=True)
    return (below + up_to - 1).double() / (2 * max(len(scores) - 1, 1))


def redundancy(group: LinearUnitGroup, gram: Float[Tensor, "I I"]) -> Float[Tensor, "U U"]:
    """Return the linear kernel alignment of each pair of units.

    ``‖XₐᵀX_b‖² / (‖XₐᵀXₐ‖ ‖X_bᵀX_b‖)`` (Frobenius) from the Gram matrix of the reader's input; 0
    where a unit's output is 0. The values are from 0 to 1. Source: Kornblith et al.,
    arXiv:1905.00414, eq. 4, uncentred.
    """
    owner = group.owner.to(gram.device)
    blocks = torch.zeros(group.units, len(gram), dtype=torch.float64, device=gram.device)
    blocks.index_add_(0, owner, gram.double().square())
    squares = torch.zeros(group.units, group.units, dtype=torch.float64, device=gram.device)
    squares.index_add_(1, owner, blocks)
    own = squares.diagonal().sqrt()
    return (squares / (own[:, None] * own).clamp_min(1e-300)).cpu()
