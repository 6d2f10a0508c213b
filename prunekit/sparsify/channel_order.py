"""The order of input channels that suits an n:m pattern best.

Shapes: R rows, C channels, G groups of m channels.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunekit.patterns.n_of_m import NOfM

ROWS = 1024
"""Maximum number of rows used; one order serves all rows."""
ROUNDS = 10
"""Maximum number of rounds of exchanges over the places of a group."""
SETTLED = 1e-3
"""The search ends after a round that gains less than this share of the loss, once every place of a
group has met every place of its neighbour."""


def find_channel_order(
    saliency: Float[Tensor, "R C"], pattern: NOfM, max_rows: int = ROWS
) -> Int[Tensor, " C"]:
    """Return the order of channels in which n:m keeps most saliency.

    Channels are first distributed over the groups by their sums, back and forth. Then, for one
    place of all groups after another, pairs of groups exchange their channels at that place while
    both together gain: with b the n-th largest of the other m − 1 values of a row in a group, a
    channel x at the place adds max(b, x) to the kept sum, and
    Σ max(b, x) = ½ (Σ b + Σ x + ‖b − x‖₁). The present order is returned if it keeps as much.

    The start is that of Zhang et al., RIA, §4, who then solve an assignment problem.

    Args:
        saliency: Saliency of each weight, any float type.
        pattern: The n:m pattern; m divides C.
        max_rows: Rows used at most, evenly spaced.
    """
    saliency = saliency[:: -(-len(saliency) // max_rows)].float()
    total = saliency.sum()
    present = torch.arange(saliency.shape[1], device=saliency.device).view(-1, pattern.m)
    groups = _distribute(saliency.sum(0), pattern.m)
    before = kept_saliency(saliency, groups, pattern.n)
    for number in range(ROUNDS):
        for place in range(pattern.m):
            _exchange(saliency, groups, place, pattern.n)
        now = kept_saliency(saliency, groups, pattern.n)
        if number + 1 >= pattern.m and now - before < SETTLED * (total - before):
            break
        before = now
        groups[1::2] = groups[1::2].roll(1, 1)
    better = kept_saliency(saliency, groups, pattern.n) > kept_saliency(
        saliency, present, pattern.n
    )
    return (groups if better else present).flatten()


def kept_saliency(
    saliency: Float[Tensor, "R C"], groups: Int[Tensor, "G m"], n: int
) -> Float[Tensor, ""]:
    """Return the sum of each row's n largest values per group.

    Args:
        saliency: Saliency of each weight.
        groups: Channels of each group.
        n: Kept per group.
    """
    return saliency[:, groups].topk(n, 2).values.sum(dtype=torch.float64)


def _distribute(sums: Float[Tensor, " C"], m: int) -> Int[Tensor, "G m"]:
    """Distribute channels, sorted by their sums, back and forth over groups."""
    parts = sums.argsort(descending=True, stable=True).view(m, -1)
    parts[1::2] = parts[1::2].flip(1)
    return parts.T.contiguous()


def _exchange(
    saliency: Float[Tensor, "R C"], groups: Int[Tensor, "G m"], place: int, n: int
) -> None:
    """Exchange channels between groups at one place while pairs gain."""
    others = torch.cat([groups[:, :place], groups[:, place + 1 :]], 1)
    least = saliency[:, others].topk(n, 2).values[..., -1]
    channels = saliency[:, groups[:, place]]
    # Row g: saliency kept by group g with each of the channels, up to a constant of the group.
    keeps = (torch.cdist(least.T, channels.T, p=1) + channels.sum(0)) / 2
    each = torch.arange(len(groups), device=groups.device)
    while True:
        own = keeps.diagonal()
        gain, mate = (keeps + keeps.T - own - own[:, None]).fill_diagonal_(0).max(1)
        agreed = (mate[mate] == each) & (gain > 1e-6 * own.abs())
        agreed &= agreed[mate]  # the threshold is relative, so one side may fail it
        if not agreed.any():
            return
        taken = torch.where(agreed, mate, each)
        keeps = keeps[:, taken]
        groups[:, place] = groups[taken, place]
