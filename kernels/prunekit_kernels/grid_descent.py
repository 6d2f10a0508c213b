"""Grid descent: improve rounded weights one column at a time.

With the residual R = (T − Q) (G + λI) of a weight Q on a grid and its target T, column j moves to
the value on the grid that errs least while all other columns stay, which is exact in one step:

    q′ = nearest(Q[:, j] + R[:, j] / (G + λI)[j, j]) where kept, else 0
    R −= (q′ − Q[:, j]) (G + λI)[j, :]

So no step raises ‖(T − Q) X‖² + λ ‖T − Q‖². The sweep that rounds compensates in later columns only
and aims at its own start; here T may be the weight from before pruning.

Source: Behdin et al., QuantEase, Algorithm 1, arXiv:2309.01885.
Shapes: O output features, I input features.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit_kernels._precision import full_precision
from prunekit_kernels.grid import Grid, nearest

BLOCK = 128  # columns between products with all later ones


def grid_descent(
    weight: Float[Tensor, "O I"],
    target: Float[Tensor, "O I"],
    gram: Float[Tensor, "I I"],
    keep: Bool[Tensor, "O I"],
    grid: Grid,
    ridge: float,
    passes: int,
) -> None:
    """Improve ``weight``, which is on ``grid`` and 0 where not kept, in place.

    Args:
        weight: Q, float32 or float64. Allocates two matrices of its size and a few of its columns.
        target: T, of the same dtype.
        gram: G, both triangles, of the same dtype.
        keep: Weights that may differ from 0.
        grid: Scales of the shape and dtype of the weight.
        ridge: λ.
        passes: How often each column is visited.
    """
    with full_precision():
        for _ in range(passes):
            residual = target - weight
            residual = torch.addmm(residual, residual, gram, beta=ridge)
            for start in range(0, weight.shape[1], BLOCK):
                _block(weight, residual, gram, keep, grid, ridge, start)


def _block(
    weight: Tensor,
    residual: Tensor,
    gram: Tensor,
    keep: Tensor,
    grid: Grid,
    ridge: float,
    start: int,
) -> None:
    """Visit the columns of a block, then update later residuals."""
    span = slice(start, min(start + BLOCK, weight.shape[1]))
    # Transposed, so that a column is contiguous.
    work, scale, kept, left = (
        part[:, span].T.contiguous() for part in (weight, grid.scale, keep, residual)
    )
    square, before = gram[span, span], work.clone()
    diagonal = square.diagonal() + ridge
    diagonal = torch.where(diagonal > 0, diagonal, 1).tolist()
    for j in range(len(work)):
        wanted = work[j] + left[j] / diagonal[j]
        rounded = nearest(wanted, scale[j], grid.kind).masked_fill_(~kept[j], 0)
        left[j + 1 :].addr_(square[j, j + 1 :], rounded - work[j], alpha=-1)
        work[j] = rounded
    weight[:, span] = work.T
    later = slice(span.stop, None)
    residual[:, later].addmm_((work - before).T, gram[span, later], alpha=-1)
