"""OBS sweep: prune column by column; later columns compensate for the errors.

Nearly all work is matrix products: a range of columns is swept by sweeping its left half,
subtracting the cost of that half's errors from the right half, and sweeping the right half. So the
columns of a range are up to date when its sweep begins, which is when their mask is selected.
:mod:`prunekit_kernels.obs_block` sweeps a block of columns.

n:m is selected row by row, so inside that launch. Half of a block, or of a row, is selected before
it, once its columns are up to date: no program of the launch sees a threshold over all rows, and a
barrier among programs would allow only as many rows as are resident at once. The price is 4 bytes
of score and 1 of mask per weight, in addition to the 9 of the sweep.

Halving leaves no far update to overlap with: half of all updates' work is one product over half of
the matrix, and every sweep waits for the product just before it.

Source: Frantar & Alistarh, SparseGPT, Algorithm 1, arXiv:2301.00774.
Shapes: O output features, I input features, C columns selected together.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit_kernels._precision import full_precision
from prunekit_kernels._triton import runs_triton
from prunekit_kernels.grid import Grid
from prunekit_kernels.obs_block import BLOCK, PANEL, NOfM, Sweep, obs_block

Choose = Callable[[Float[Tensor, "O C"], int], Bool[Tensor, "O C"]]


def obs_sweep(
    weight: Float[Tensor, "O I"],
    upper: Float[Tensor, "I I"],
    choose: NOfM | Choose | Bool[Tensor, "O I"],
    stride: int | None = None,
    allowed: Bool[Tensor, "O I"] | None = None,
    grid: Grid | None = None,
) -> Bool[Tensor, "O I"]:
    """Prune ``weight`` in place and return the keep mask.

    Pruned weights are exactly 0. Rows do not mix, unless ``choose`` mixes them: a slice of rows is
    pruned as it is among all rows.

    Args:
        weight: Float32 or float64. Allocates a matrix of its size, a mask and blocks of columns;
            for a kernel another matrix and mask; and the memory of ``choose``. Products are in its
            dtype, float32 without TF32: TF32 rounds to 11 bits, errs by 3e-4 of a product, and
            would swap scores closer than that.
        upper: U of the layer's inputs, of the same dtype.
        choose: n:m; or a keep mask; or ``choose(score, start) -> keep`` for columns ``start`` and
            on, where ``score`` is w² / U[j, j]² of the current weight: the cost of pruning each
            alone.
        stride: How many columns a function selects together; None for 128, as published.
        allowed: Weights that may be kept. The others, such as weights that were already 0, are
            always pruned; a function sees the score −inf for them.
        grid: Kept weights are rounded to it, and later ones compensate for that too.

    Raises:
        ValueError: Shapes or types do not match, or ``choose`` returns another shape.
    """
    _check(weight, upper, choose, allowed, grid)
    kept = torch.ones_like(weight, dtype=torch.bool, memory_format=torch.contiguous_format)
    for mask in (allowed, choose):
        if isinstance(mask, Tensor):
            kept &= mask
    # Transposed, a column is contiguous: kernels need that; on a CPU each block is copied so.
    work, keep = weight.T, kept.T
    if runs_triton(weight):
        work, keep = work.contiguous(), keep.contiguous()
    errors = torch.empty(work.shape, dtype=work.dtype, device=work.device)
    rounding = (grid.scale.T, grid.kind) if grid else ()
    sweep = Sweep(work, errors, keep, upper, *rounding)
    if weight.numel():
        with full_precision():
            sweep.halves(0, weight.shape[1], *_step(sweep, choose, stride))
    if runs_triton(weight):
        weight.copy_(work.T)
    return keep.T.contiguous()


def obs_sweep_reference(
    weight: Float[Tensor, "O I"],
    upper: Float[Tensor, "I I"],
    choose: Choose,
    stride: int | None = None,
) -> Bool[Tensor, "O I"]:
    """Do the same by rank-one updates, as in the published code.

    Args:
        weight: Pruned in place.
        upper: U.
        choose: As in :func:`obs_sweep`, a function.
        stride: How many columns it selects together; None for 128.
    """
    stride = stride or BLOCK
    block = stride * max(1, BLOCK // stride)
    keep = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        columns, factor = weight[:, start:end].clone(), upper[start:end, start:end]
        errors = torch.zeros_like(columns)
        for j in range(end - start):
            if j % stride == 0:
                group = slice(j, min(j + stride, end - start))
                score = columns[:, group] ** 2 / factor.diagonal()[group] ** 2
                keep[:, start:end][:, group] = choose(score, start + j)
            pruned = torch.where(keep[:, start + j], columns[:, j], 0)
            errors[:, j] = (columns[:, j] - pruned) / factor[j, j]
            columns[:, j:] -= errors[:, j, None] @ factor[None, j, j:]
            columns[:, j] = pruned
        weight[:, start:end] = columns
        weight[:, end:] -= errors @ upper[start:end, end:]
    return keep


def _step(
    sweep: Sweep, choose: NOfM | Choose | Tensor, stride: int | None
) -> tuple[int, Callable[[int, int], None]]:
    """Return the columns per leaf, and the function of a leaf."""
    if isinstance(choose, NOfM):
        # A block holds whole groups and whole panels.
        panel = max(PANEL // choose.m * choose.m, choose.m)
        return max(BLOCK // panel, 1) * panel, lambda start, end: obs_block(
            sweep, start, end, choose
        )
    if isinstance(choose, Tensor):
        return BLOCK, lambda *span: obs_block(sweep, *span)

    def leaf(start: int, end: int) -> None:
        score = sweep.score(start, end).T
        mask = choose(score, start)
        if mask.shape != score.shape:
            raise ValueError(f"choose returned {tuple(mask.shape)} for scores {tuple(score.shape)}")
        sweep.keep[start:end] &= mask.T
        sweep.halves(start, end, BLOCK, lambda *span: obs_block(sweep, *span))

    return stride or BLOCK, leaf


def _check(
    weight: Tensor, upper: Tensor, choose: object, allowed: Tensor | None, grid: Grid | None
) -> None:
    outputs, inputs = weight.shape
    if grid and (grid.scale.shape != weight.shape or grid.scale.dtype != weight.dtype):
        raise ValueError(
            f"scale must be {weight.dtype} of shape {(outputs, inputs)}, "
            f"got {grid.scale.dtype} of shape {tuple(grid.scale.shape)}"
        )
    if upper.shape != (inputs, inputs) or upper.dtype != weight.dtype:
        raise ValueError(
            f"upper must be {weight.dtype} of shape {(inputs, inputs)}, "
            f"got {upper.dtype} of shape {tuple(upper.shape)}"
        )
    if isinstance(choose, NOfM) and (inputs % choose.m or not 0 < choose.n <= choose.m):
        n, m = choose
        raise ValueError(f"{n}:{m} needs 0 < n ≤ m and a multiple of {m} inputs, got {inputs}")
    for name, mask in (("choose", choose), ("allowed", allowed)):
        if isinstance(mask, Tensor) and (mask.shape != weight.shape or mask.dtype != torch.bool):
            raise ValueError(
                f"{name} must be bool of shape {(outputs, inputs)}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
