"""TODO-DOC prunekit/sparsify/channel_order.py (out of prunekit/permutation.py)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunekit.patterns.n_of_m import NOfM

ROWS = 1024
"""Rows of a weight that are looked at at most; a group of m is chosen by all of them together."""
ROUNDS = 10
SETTLED = 1e-3
"""A round over the places of a group that gains less, as a share of the loss, is the last, once
every place of a group has met every place of its neighbour."""


def order(saliency: Float[Tensor, "R C"], pattern: NOfM, most: int = ROWS) -> Int[Tensor, " C"]:
    """Return the order of channels in which n:m keeps most; never one that keeps less than now.

    Channels are dealt out to the groups by their sums, forth and back. Then, place after place of
    all groups, groups exchange the channels there where both together gain, until none does: with
    b the n-th largest of the other m − 1 weights of a row in a group, a channel x there adds
    max(b, x) to what is kept, and Σ max(b, x) = ½ (Σ b + Σ x + ‖b − x‖₁).

    The start is that of Zhang et al., RIA, §4, who solve an assignment where this exchanges.
    At most so many rows are looked at.
    """
    saliency = saliency[:: -(-len(saliency) // most)].float()
    total = saliency.sum()
    given = torch.arange(saliency.shape[1], device=saliency.device).view(-1, pattern.m)
    groups = _dealt(saliency.sum(0), pattern.m)
    before = kept(saliency, groups, pattern.n)
    for number in range(ROUNDS):
        for place in range(pattern.m):
            _exchange(saliency, groups, place, pattern.n)
        now = kept(saliency, groups, pattern.n)
        if number + 1 >= pattern.m and now - before < SETTLED * (total - before):
            break
        before = now
        groups[1::2] = groups[1::2].roll(1, 1)
    better = kept(saliency, groups, pattern.n) > kept(saliency, given, pattern.n)
    return (groups if better else given).flatten()


def kept(saliency: Float[Tensor, "R C"], groups: Int[Tensor, "G m"], n: int) -> Float[Tensor, ""]:
    """Return the sum of the n largest of each group of each row."""
    return saliency[:, groups].topk(n, 2).values.sum(dtype=torch.float64)


def _dealt(sums: Float[Tensor, " C"], m: int) -> Int[Tensor, "G m"]:
    """Return groups of one channel of each m-th part, the largest with the smallest."""
    parts = sums.argsort(descending=True, stable=True).view(m, -1)
    parts[1::2] = parts[1::2].flip(1)
    return parts.T.contiguous()


def _exchange(
    saliency: Float[Tensor, "R C"], groups: Int[Tensor, "G m"], place: int, n: int
) -> None:
    """Exchange channels at one place of the groups, in place, while a pair of groups gains."""
    others = torch.cat([groups[:, :place], groups[:, place + 1 :]], 1)
    least = saliency[:, others].topk(n, 2).values[..., -1]
    channels = saliency[:, groups[:, place]]
    # Row g: what group g keeps with each of the channels, less what is the same for all.
    keeps = (torch.cdist(least.T, channels.T, p=1) + channels.sum(0)) / 2
    each = torch.arange(len(groups), device=groups.device)
    while True:
        own = keeps.diagonal()
        gain, mate = (keeps + keeps.T - own - own[:, None]).fill_diagonal_(0).max(1)
        agreed = (mate[mate] == each) & (gain > 1e-6 * own.abs())
        agreed &= agreed[mate]  # what is much to one may be nothing to the other
        if not agreed.any():
            return
        taken = torch.where(agreed, mate, each)
        keeps = keeps[:, taken]
        groups[:, place] = groups[taken, place]
