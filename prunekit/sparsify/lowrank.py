"""Low-rank adapters that make up for pruned weights.

With E = W − W′ the weight lost by pruning and H = XᵀX of the inputs, ‖(E − BA)X‖² is least over
products of rank r for B = U, A = UᵀE, where U holds the first r eigenvectors of E H Eᵀ: those of
EoRA (Liu et al., arXiv:2410.21271), which projects onto the eigenspace of H, found here without a
square root or an inverse of H.

Shapes: O output features, I input features.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit.checkpoint.adapter import Adapter

ITERATIONS, SPARE = 8, 16
"""Of subspace iteration for the eigenvectors: steps, and vectors beyond the rank."""


def low_rank_factors(lost: Float[Tensor, "O I"], gram: Float[Tensor, "I I"], rank: int) -> Adapter:
    """Return the product BA of a rank that minimises ‖(E − BA)X‖².

    Args:
        lost: E, float32.
        gram: H, float32, both triangles.
        rank: Rank of the product; at most the number of rows and of columns.
    """
    outputs, inputs = lost.shape
    rank = min(rank, outputs, inputs)
    seed = torch.Generator().manual_seed(0)
    basis = torch.randn(outputs, min(rank + SPARE, outputs), generator=seed).to(lost)
    weighed = lost @ gram
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(weighed @ (lost.T @ basis)).Q
    small = (basis.T @ weighed) @ (lost.T @ basis)
    up = basis @ torch.linalg.eigh((small + small.T) / 2).eigenvectors[:, -rank:]
    return Adapter(up, up.T @ lost)


def add_adapter(
    weight: Float[Tensor, "O I"],
    lost: Float[Tensor, "O I"],
    gram: Float[Tensor, "I I"],
    rank: int,
    dtype: torch.dtype,
) -> Adapter:
    """Add a low-rank adapter to a pruned weight in place; return it, on the CPU.

    Args:
        weight: The weight in its model.
        lost: What pruning took from it, float32.
        gram: H, float32, both triangles.
        rank: Rank of the adapter.
        dtype: Type in which it is stored.
    """
    found = low_rank_factors(lost, gram, rank)
    adapter = Adapter(found.up.to(dtype), found.down.to(dtype))
    weight.add_(adapter.product.to(weight.device))
    return Adapter(adapter.up.cpu(), adapter.down.cpu())
