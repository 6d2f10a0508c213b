"""What the kept weights of a layer aim at.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jaxtyping import Float

from prunekit.errors import NumericsError
from prunekit.statistics import Cross, Gathered, Gram

if TYPE_CHECKING:
    from torch import Tensor

Target = Literal["layer", "dense"]
SHARE = 0.5
"""β: how far towards the dense model's outputs."""
RIDGE = 0.01
"""r at least, as a fraction of the Gram matrix's mean diagonal; more where more is noise."""
PANEL = 256


def aim(weight: Float[Tensor, "O I"], stats: Gathered) -> Float[Tensor, "O I"]:
    """Return the weight that, on what the pruned model feeds it, comes nearest to the dense output.

    With H = XₚᵀXₚ and C = X_dᵀXₚ of the inputs in the pruned and in the dense model, the nearest to
    W X_d is (WC + rW)(H + rI)⁻¹ = W + WE(H + rI)⁻¹ with E = C − H = (X_d − Xₚ)ᵀXₚ, which is what is
    gathered; β of the way there is gone.

    Raises:
        NumericsError: The Gram matrix is not one.
    """
    import torch

    shift = stats.once("shift", lambda: _shift(stats))
    return torch.addmm(weight, weight, shift, alpha=SHARE)


def _shift(stats: Gathered) -> Float[Tensor, "I I"]:
    """Return E(H + rI)⁻¹, in the memory of E."""
    import torch
    from prunekit_kernels import mean_diagonal

    gram, shift = stats[Gram].full, stats[Cross].total
    lower = gram.clone()
    ridge = max(RIDGE, stats[Gram].noise)
    lower.diagonal().add_(ridge * mean_diagonal(gram))
    lower, failed = torch.linalg.cholesky_ex(lower)
    if failed:
        raise NumericsError(
            "The Gram matrix is not positive definite. Use more calibration tokens."
        )
    for part in shift.split(PANEL):
        part.copy_(torch.cholesky_solve(part.T, lower).T)
    return shift
