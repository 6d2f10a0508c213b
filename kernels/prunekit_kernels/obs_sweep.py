"""OBS sweep: prune column by column; the columns to come make up for each weight that goes.

Nearly all the work is matrix products: a range of columns is swept by sweeping its left half,
subtracting what that half's errors cost the right half, and sweeping the right half. So the columns
of a range are up to date whenever its sweep begins, which is when they are chosen. What happens
inside of a block of columns is :mod:`prunekit_kernels.obs_block`.

n:m is chosen by each row for itself, so inside of that launch. Half of a block, or of a row, is
chosen before it, once its columns are up to date: a threshold over all rows is seen by no program
of the launch, and a barrier among them would allow only as many rows as are resident at once. The
price is 4 bytes of score and 1 of mask a weight, beside the 9 of the sweep.

Halving leaves no far update to overlap with: half of all updates' work is one product over half of
the matrix, and every sweep waits for the product just before it.

Source: Frantar & Alistarh, SparseGPT, Algorithm 1, arXiv:2301.00774.
Shapes: O output features, I input features, C columns chosen together.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit_kernels._precision import full_precision
from prunekit_kernels._triton import runs_triton
from prunekit_kernels.obs_block import BLOCK, PANEL, NOfM, Sweep, obs_block

Choose = Callable[[Float[Tensor, "O C"], int], Bool[Tensor, "O C"]]


def obs_sweep(
    weight: Float[Tensor, "O I"],
    upper: Float[Tensor, "I I"],
    choose: NOfM | Choose | Bool[Tensor, "O I"],
    stride: int | None = None,
    allowed: Bool[Tensor, "O I"] | None = None,
) -> Bool[Tensor, "O I"]:
    """Prune ``weight`` in place and return the mask of what stays; the rest is exactly 0.

    Rows do not mix, unless ``choose`` mixes them: a slice of rows is pruned as it is among all.

    Args:
        weight: Float32 or float64. Beside it, a matrix of its size, a mask and blocks of columns
            are allocated, for a kernel another matrix and mask, and what ``choose`` takes. Products
            are in its type, float32 without TF32: that rounds to 11 bits, errs 3e-4 of a product,
            and scores nearer than that would change places.
        upper: U of the layer's inputs, of the same type.
        choose: n:m; or a mask of what stays; or ``choose(score, start) -> keep`` for columns
            ``start`` and on, where ``score`` is w² / U[j, j]² of the weight as it is by then: what
            pruning each alone would cost.
        stride: How many columns a function chooses together; None for 128, as published.
        allowed: What may stay. The rest, such as weights that were 0 before, goes whatever is
            chosen; to a function its score is −inf.

    Raises:
        ValueError: Shapes or types do not fit, or ``choose`` returns another shape.
    """
    _check(weight, upper, choose, allowed)
    stays = torch.ones_like(weight, dtype=torch.bool, memory_format=torch.contiguous_format)
    for mask in (allowed, choose):
        if isinstance(mask, Tensor):
            stays &= mask
    # Transposed, a column is contiguous: a kernel wants it so, on a CPU each block is made so.
    work, keep = weight.T, stays.T
    if runs_triton(weight):
        work, keep = work.contiguous(), keep.contiguous()
    sweep = Sweep(work, torch.empty(work.shape, dtype=work.dtype, device=work.device), keep, upper)
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
    """Do the same as the published code does: rank-one updates inside blocks of columns."""
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
    """Return how many columns are swept at a time, and what does it."""
    if isinstance(choose, NOfM):
        # Whole groups and whole panels.
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


def _check(weight: Tensor, upper: Tensor, choose: object, allowed: Tensor | None) -> None:
    outputs, inputs = weight.shape
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
