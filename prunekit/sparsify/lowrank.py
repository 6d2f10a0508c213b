"""TODO-DOC prunekit/sparsify/lowrank.py (out of prunekit/lowrank.py)."""

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit.checkpoint.adapter import Adapter

ITERATIONS, SPARE = 8, 16
"""Of the search for eigenvectors, and with how many more of them than are wanted."""


def factors(change: Float[Tensor, "O I"], gram: Float[Tensor, "I I"], rank: int) -> Adapter:
    """Return the best BA of a rank, or of as many as there are rows or columns.

    Args:
        change: E, float32.
        gram: H, both triangles.
        rank: R at most.
    """
    outputs, inputs = change.shape
    rank = min(rank, outputs, inputs)
    seed = torch.Generator().manual_seed(0)
    basis = torch.randn(outputs, min(rank + SPARE, outputs), generator=seed).to(change)
    weighed = change @ gram
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(weighed @ (change.T @ basis)).Q
    small = (basis.T @ weighed) @ (change.T @ basis)
    up = basis @ torch.linalg.eigh((small + small.T) / 2).eigenvectors[:, -rank:]
    return Adapter(up, up.T @ change)
