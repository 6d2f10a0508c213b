"""How far two rankings agree, and how far units of a layer do the same.

Shapes: U units of a site, I inputs of the linear that reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit.models.units.heads_neurons import Site

if TYPE_CHECKING:
    from prunekit.structured.gated_model import Scores


def spearman(first: Scores, second: Scores) -> float:
    """Return Spearman's ρ of two rankings of all units, from −1 to 1; 0 if one ranks nothing."""
    a, b = (places(torch.cat([scores[name] for name in first])) for scores in (first, second))
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else 0.0


def places(scores: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the share of other scores that are lower, equal ones counted half."""
    ordered = scores.sort().values
    below = torch.searchsorted(ordered, scores)
    upto = torch.searchsorted(ordered, scores, right=True)
    return (below + upto - 1).double() / (2 * max(len(scores) - 1, 1))


def redundancy(site: Site, gram: Float[Tensor, "I I"]) -> Float[Tensor, "U U"]:
    """Return how alike what two units give is, 0 to 1: their linear kernel alignment.

    ``‖XₐᵀX_b‖² / (‖XₐᵀXₐ‖ ‖X_bᵀX_b‖)`` (Frobenius) from the Gram matrix of what the linear reads;
    0 where a unit gives nothing. Source: Kornblith et al., arXiv:1905.00414, eq. 4, uncentred.
    """
    owner = site.owner.to(gram.device)
    blocks = torch.zeros(site.units, len(gram), dtype=torch.float64, device=gram.device)
    blocks.index_add_(0, owner, gram.double().square())
    squares = torch.zeros(site.units, site.units, dtype=torch.float64, device=gram.device)
    squares.index_add_(1, owner, blocks)
    own = squares.diagonal().sqrt()
    return (squares / (own[:, None] * own).clamp_min(1e-300)).cpu()
