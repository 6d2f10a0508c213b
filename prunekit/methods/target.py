"""Weights whose outputs the pruned layer should reproduce.

Shapes: O output features, R rows of them, I input features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float

from prunekit.errors import NumericsError
from prunekit.statistics import CrossGram, Gram, StageStatistics

if TYPE_CHECKING:
    from prunekit_kernels import Pending
    from torch import Tensor

Target = Literal["layer", "dense"]
SHARE = 0.5
"""β: the share of the way from the layer's own outputs to those of the dense model."""
RIDGE = 0.01
"""Least r, as a fraction of the Gram matrix's mean diagonal; its noise if that is larger."""


def reconstruction_target(
    weight: Float[Tensor, "R I"], stats: StageStatistics, outputs: int
) -> Float[Tensor, "R I"]:
    """Return the weight whose outputs approach those of the dense model.

    With H = XₚᵀXₚ and C = X_dᵀXₚ of the inputs in the pruned and in the dense model, the ridge
    regression of W X_d is (WC + rW)(H + rI)⁻¹ = W + WE(H + rI)⁻¹, where E = C − H = (X_d − Xₚ)ᵀXₚ
    is the statistic :class:`~prunekit.statistics.CrossGram`. The result is
    W + β WE(H + rI)⁻¹.

    Args:
        weight: W, or some of its rows.
        stats: Statistics of the stage, with its Gram matrix and ``CrossGram``.
        outputs: All rows of W, so that ranks with some of them compute in the same order.

    Raises:
        NumericsError: The Gram matrix is not positive definite.
    """
    from prunekit_kernels import value_of

    correction, succeeded = stats.once(CrossGram, lambda: _correction(stats, outputs))
    target = correction(weight).mul_(SHARE).add_(weight)
    if not value_of(succeeded):
        raise NumericsError(
            "The Gram matrix is not positive definite. Use more calibration tokens."
        )
    return target


def _correction(
    stats: StageStatistics, outputs: int
) -> tuple[Callable[[Float[Tensor, "O I"]], Float[Tensor, "O I"]], bool | Pending]:
    """Return the function W ↦ WE(H + rI)⁻¹, and whether the inverse exists.

    If W has more rows than columns, E(H + rI)⁻¹ is computed once for all layers.
    """
    (lower, succeeded), cross = _factor(stats[Gram]), stats[CrossGram].total
    if outputs <= len(cross):
        return lambda weight: _solve(weight @ cross, lower), succeeded
    shift = _solve(cross, lower)
    return lambda weight: weight @ shift, succeeded


def _factor(statistic: Gram) -> tuple[Float[Tensor, "I I"], bool | Pending]:
    """Return the lower L with LLᵀ = H + rI, and whether it exists."""
    from prunekit_kernels import cholesky, mean_diagonal

    gram = statistic.full
    lower = gram.clone().T
    lower.diagonal().add_(max(RIDGE, statistic.noise) * mean_diagonal(gram))
    return lower, cholesky(lower)


def _solve(rows: Float[Tensor, "O I"], lower: Float[Tensor, "I I"]) -> Float[Tensor, "O I"]:
    """Return X(LLᵀ)⁻¹ in the memory of X."""
    from torch.linalg import solve_triangular

    solve_triangular(lower.T, rows, upper=True, left=False, out=rows)
    return solve_triangular(lower, rows, upper=False, left=False, out=rows)
