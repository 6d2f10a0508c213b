"""Relative output error of a pruned linear, from a Gram matrix.

Shapes: O output features, I input features.
"""

import torch
from jaxtyping import Float
from prunekit_kernels import to_host
from torch import Tensor

from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.statistics import Gram, StageStatistics

ENERGY_PANEL = 192
"""Columns of a weight that are multiplied by the Gram matrix in one product."""


def relative_error(
    dense: Float[Tensor, "O I"],
    pruned: Float[Tensor, "O I"],
    stats: StageStatistics,
    ranks: Ranks = SINGLE,
) -> float | None:
    """Return ‖WX − W′X‖² / ‖WX‖², or None without a Gram matrix.

    Of a GPU it is pending, for :func:`prunekit_kernels.value_of`.

    Args:
        dense: W, float32.
        pruned: W′, float32.
        stats: Statistics of the inputs X.
        ranks: Processes that hold the other rows, over which the sums are reduced.
    """
    found = next((statistic for statistic in stats if isinstance(statistic, Gram)), None)
    if found is None or not found.tokens:
        return None
    gram = found.full
    sums = torch.stack([_energy(dense, gram), _energy(dense - pruned, gram)])
    ranks.all_reduce_sum(sums, "errors")
    return to_host(sums, lambda found: _ratio(*found.tolist()))


def _ratio(energy: float, loss: float) -> float:
    return max(loss, 0.0) / energy if energy > 0 else 0.0


def _energy(weight: Float[Tensor, "O I"], gram: Float[Tensor, "I I"]) -> Float[Tensor, ""]:
    """Return ‖WX‖² by panels of columns; H is symmetric, so half suffices."""
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[1], ENERGY_PANEL):
        panel, end = weight[:, start : start + ENERGY_PANEL], start + ENERGY_PANEL
        product = panel @ gram[start:end, start:end]
        product.addmm_(weight[:, end:], gram[end:, start:end], alpha=2)
        total += product.mul_(panel).sum(dtype=torch.float64)
    return total
