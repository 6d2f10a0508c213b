"""OBS sweep: prune column by column; the columns to come make up for each weight that goes.

Column j of the weight, with the factor U of :mod:`prunekit_kernels.inverse_factor`:

    e[:, j] = w[:, j] / U[j, j] where pruned, else 0
    w[:, j:] -= e[:, j] U[j, j:]

Source: Frantar & Alistarh, SparseGPT, Algorithm 1, arXiv:2301.00774.
Shapes: O output features, I input features, C columns chosen together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit_kernels._precision import full_precision

Choose = Callable[[Float[Tensor, "O C"], int], Bool[Tensor, "O C"]]

LEAF = 16  # columns swept one by one between matrix products: fastest of 4..32


def obs_sweep(
    weight: Float[Tensor, "O I"],
    upper: Float[Tensor, "I I"],
    choose: Choose,
    stride: int | None,
    block: int = 128,
) -> Bool[Tensor, "O I"]:
    """Prune ``weight`` in place and return the mask of what stays; the rest is exactly 0.

    Nearly all the work is matrix products: a range of columns is swept by sweeping its left half,
    subtracting what that half's errors cost the right half, and sweeping the right half. So the
    columns of a range are up to date whenever its sweep begins, which is when they are chosen.

    Args:
        weight: Float32 or float64. Beside it, two matrices of its size are allocated.
        upper: U of the layer's inputs, of the same type.
        choose: ``choose(score, start) -> keep`` for columns ``start`` and on, where ``score`` is
            w² / U[j, j]² of the weight as it is by then: what pruning each alone would cost.
        stride: How many columns are chosen together (m of n:m); None for ``block``.
        block: What the published code chooses together when unstructured.

    Raises:
        ValueError: Shapes or types do not fit, or ``choose`` returns another shape.
    """
    inputs = weight.shape[1]
    if upper.shape != (inputs, inputs) or upper.dtype != weight.dtype:
        raise ValueError(
            f"upper must be {weight.dtype} of shape {(inputs, inputs)}, "
            f"got {upper.dtype} of shape {tuple(upper.shape)}"
        )
    # Transposed, a column is contiguous.
    work = weight.T.contiguous()
    keep = torch.zeros_like(work, dtype=torch.bool)
    sweep = _Sweep(work, torch.empty_like(work), keep, upper, choose)
    if weight.numel():
        with full_precision():
            sweep.halves(0, inputs, stride or block, sweep.group)
    weight.copy_(work.T)
    return keep.T.contiguous()


def obs_sweep_reference(
    weight: Float[Tensor, "O I"],
    upper: Float[Tensor, "I I"],
    choose: Choose,
    stride: int | None,
    block: int = 128,
) -> Bool[Tensor, "O I"]:
    """Do the same as the published code does: rank-one updates inside blocks of columns."""
    stride = stride or block
    block = stride * max(1, block // stride)
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


@dataclass(frozen=True)
class _Sweep:
    """The state of a sweep, transposed; each method brings columns ``start`` to ``end`` to the end.

    ``errors`` is written before it is read.
    """

    work: Float[Tensor, "I O"]
    errors: Float[Tensor, "I O"]
    keep: Bool[Tensor, "I O"]
    upper: Float[Tensor, "I I"]
    choose: Choose

    def halves(self, start: int, end: int, unit: int, leaf: Callable[[int, int], None]) -> None:
        """Call ``leaf`` on every ``unit`` columns in turn, each time up to date."""
        if end - start <= unit:
            leaf(start, end)
            return
        units = -(-(end - start) // unit)
        middle = start + unit * (units // 2)
        self.halves(start, middle, unit, leaf)
        effect = self.upper[start:middle, middle:end].T
        self.work[middle:end].addmm_(effect, self.errors[start:middle], alpha=-1)
        self.halves(middle, end, unit, leaf)

    def group(self, start: int, end: int) -> None:
        """Choose what stays of columns that are chosen together, then sweep them."""
        diagonal = self.upper.diagonal()[start:end, None]
        score = (self.work[start:end] / diagonal).square_().T
        keep = self.choose(score, start)
        if keep.shape != score.shape:
            raise ValueError(f"choose returned {tuple(keep.shape)} for scores {tuple(score.shape)}")
        self.keep[start:end] = keep.T
        self.halves(start, end, LEAF, self.columns)

    def columns(self, start: int, end: int) -> None:
        """Sweep a few columns one by one; the earlier ones of them are made up for just in time."""
        work, errors, keep = (part[start:end] for part in (self.work, self.errors, self.keep))
        # Errors that are still 0 cost nothing, so that every column takes the same two calls.
        errors.zero_()
        pruned = (~keep).to(work.dtype).div_(self.upper.diagonal()[start:end, None])
        costs = self.upper[start:end, start:end].T.contiguous()
        for column, error, cost, gone in zip(work, errors, costs, pruned, strict=True):
            column.addmv_(errors.T, cost, alpha=-1)
            torch.mul(column, gone, out=error)
        work.masked_fill_(~keep, 0)
