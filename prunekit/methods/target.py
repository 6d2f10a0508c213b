"""What the kept weights of a layer aim at.

Shapes: O output features, R of them, I input features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float

from prunekit.errors import NumericsError
from prunekit.statistics import CrossGram, Gram, StageStatistics

if TYPE_CHECKING:
    from torch import Tensor

Target = Literal["layer", "dense"]
SHARE = 0.5
"""β: how far towards the dense model's outputs."""
RIDGE = 0.01
"""r at least, as a fraction of the Gram matrix's mean diagonal; more where more is noise."""


def reconstruction_target(
    weight: Float[Tensor, "R I"], stats: StageStatistics, outputs: int
) -> Float[Tensor, "R I"]:
    """Return the weight that, on what the pruned model feeds it, comes nearest to the dense output.

    With H = XₚᵀXₚ and C = X_dᵀXₚ of the inputs in the pruned and in the dense model, the nearest to
    W X_d is (WC + rW)(H + rI)⁻¹ = W + WE(H + rI)⁻¹ with E = C − H = (X_d − Xₚ)ᵀXₚ, which is what is
    gathered; β of the way there is gone.

    Args:
        weight: Rows of W, or all.
        stats: What was gathered for the stage.
        outputs: All rows of W: ranks that have some of them reckon alike.

    Raises:
        NumericsError: The Gram matrix is not one.
    """
    way = stats.once(CrossGram, lambda: _way(stats, outputs))
    return way(weight).mul_(SHARE).add_(weight)


def _way(
    stats: StageStatistics, outputs: int
) -> Callable[[Float[Tensor, "O I"]], Float[Tensor, "O I"]]:
    """Return what gives WE(H + rI)⁻¹ of a weight W; of few outputs that is done for each alone."""
    lower, cross = _factor(stats[Gram]), stats[CrossGram].total
    if outputs <= len(cross):
        return lambda weight: _solve(weight @ cross, lower)
    shift = _solve(cross, lower)
    return lambda weight: weight @ shift


def _factor(statistic: Gram) -> Float[Tensor, "I I"]:
    """Return the lower L with LLᵀ = H + rI."""
    from prunekit_kernels import cholesky, mean_diagonal

    gram = statistic.full
    lower = gram.clone().T
    lower.diagonal().add_(max(RIDGE, statistic.noise) * mean_diagonal(gram))
    if not cholesky(lower):
        raise NumericsError(
            "The Gram matrix is not positive definite. Use more calibration tokens."
        )
    return lower


def _solve(rows: Float[Tensor, "O I"], lower: Float[Tensor, "I I"]) -> Float[Tensor, "O I"]:
    """Return X(LLᵀ)⁻¹ in the memory of X."""
    from torch.linalg import solve_triangular

    solve_triangular(lower.T, rows, upper=True, left=False, out=rows)
    return solve_triangular(lower, rows, upper=False, left=False, out=rows)
