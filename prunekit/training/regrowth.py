"""Regrowth: pruned weights return, and as many others are pruned.

Shapes: O output features, I input features.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit.patterns import Pattern


class Regrowth(NamedTuple):
    """A weight that is to regrow.

    Attributes:
        weight: The weight.
        gradient: Gradient of the loss by all weights, also pruned ones.
        keep: Mask of the weights that are kept now.
        share: Fraction of the pruned weights that returns.
    """

    weight: Float[Tensor, "O I"]
    gradient: Float[Tensor, "O I"]
    keep: Bool[Tensor, "O I"]
    share: float


@torch.no_grad()
def regrown(pattern: Pattern, sparsity: float, layer: Regrowth) -> Bool[Tensor, "O I"]:
    """Return the mask after a regrowth, with exact counts.

    Pruned weights with the largest gradient return; of the others the pattern prunes those with the
    smallest magnitude (RigL, Evci et al., arXiv:1911.11134, section 3). Weights without a gradient
    do not return.

    Args:
        pattern: The pattern of the layer.
        sparsity: Its fraction of zeros, 0..1.
        layer: The weight that is to regrow.
    """
    gradient = layer.gradient.detach().float().abs().masked_fill(layer.keep, 0)
    count = int(layer.share * int((~layer.keep).sum()))
    if not count or not bool(gradient.any()):
        return layer.keep
    if pattern.tiled:
        returns = pattern.keep(gradient, 1 - count / gradient.numel()) & ~layer.keep
    else:
        returns = torch.zeros_like(layer.keep).flatten()
        returns[gradient.flatten().topk(count).indices] = True
        returns = returns.view_as(layer.keep)
    returns &= gradient > 0
    # From 0 to 1 for kept weights, from 1 to 2 for those that return.
    magnitude = layer.weight.detach().float().abs()
    score = magnitude / magnitude.max().clamp_min(1e-30) * layer.keep
    score = torch.where(returns, 1 + gradient / gradient.max(), score)
    dropped = 0.0 if pattern.tiled else -1.0
    return pattern.keep(score.masked_fill(~layer.keep & ~returns, dropped), sparsity)
