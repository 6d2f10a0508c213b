"""OBS block: sweep a block of up-to-date columns, one by one.

For column j of the weight, with the factor U of :mod:`prunekit_kernels.inverse_factor`:

    e[:, j] = w[:, j] / U[j, j] where pruned, else 0
    w[:, j:] -= e[:, j] U[j, j:]

With a grid, kept weights are rounded to it as their column is reached, and e[:, j] of those is
(w − q)[:, j] / U[j, j]: the joint step of SparseGPT, and GPTQ (arXiv:2210.17323) if all are kept.

On CUDA a block is one launch, and each thread sweeps one row in panels of 16 columns. Groups longer
than a panel are selected before their columns are swept. A launch reads and writes 9 bytes per
weight, plus 4 bytes of errors for every later panel: it is bound by instructions, not by memory.
With a grid the sweep of the CPU runs there too, whose launches are several for each column.

Source: Frantar & Alistarh, SparseGPT, Algorithm 1, arXiv:2301.00774.
Shapes: O output features, I input features. Everything is transposed, so that a column is
contiguous.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit_kernels._obs_block_kernel import kernel
from prunekit_kernels._precision import full_precision
from prunekit_kernels._triton import INTERPRETED, runs_triton, triton
from prunekit_kernels.grid import nearest
from prunekit_kernels.groups import Groups
from prunekit_kernels.packed_mask import INTEGERS
from prunekit_kernels.selection import arrays, choose, highest, without_nan

BLOCK = 128  # columns of a launch
LEAF = 16  # columns swept one by one between matrix products on a CPU: fastest of 8..32
TOGETHER = 4  # columns that one product updates, where n:m does not set the number
PANEL = 16  # columns that a thread of the kernel holds; 32 would not fit its registers


class NOfM(NamedTuple):
    """Keep n of every m neighbours, selected during the sweep.

    Higher scores are kept, ties keep the lower index, NaN counts as lowest.
    """

    n: int
    m: int


class Sweep(NamedTuple):
    """State of a sweep, transposed.

    Attributes:
        work: The weight; finished columns are exactly 0 where pruned. Any strides on a CPU, as
            ``keep``; contiguous for a kernel.
        errors: Errors of finished columns, to be compensated; other columns are never read.
        keep: In finished columns the kept weights, in others those that may be kept.
        upper: U.
        scale: Scale of each weight, if those that are kept are rounded to multiples of it.
        kind: Which multiples, as in :mod:`prunekit_kernels.grid`.
    """

    work: Float[Tensor, "I O"]
    errors: Float[Tensor, "I O"]
    keep: Bool[Tensor, "I O"]
    upper: Float[Tensor, "I I"]
    scale: Float[Tensor, "I O"] | None = None
    kind: str = ""

    def halves(self, start: int, end: int, unit: int, leaf: Callable[[int, int], None]) -> None:
        """Call ``leaf`` on every ``unit`` columns in order, each up to date.

        Args:
            start: First column.
            end: One past the last.
            unit: Columns of a leaf; the last may have fewer.
            leaf: Sweeps the columns from its first to its second argument.
        """
        if end - start <= unit:
            leaf(start, end)
            return
        units = -(-(end - start) // unit)
        middle = start + unit * (units // 2)
        self.halves(start, middle, unit, leaf)
        self.compensate(start, middle, end)
        self.halves(middle, end, unit, leaf)

    def compensate(self, start: int, middle: int, end: int) -> None:
        """Compensate the errors of earlier columns in later ones.

        Args:
            start: First column with errors.
            middle: First column to update.
            end: One past the last.
        """
        effect = self.upper[start:middle, middle:end].T
        self.work[middle:end].addmm_(effect, self.errors[start:middle], alpha=-1)

    def score(self, start: int, end: int) -> Float[Tensor, "C O"]:
        """Return w² / U[j, j]² of up-to-date columns; −inf where not allowed."""
        score = (self.work[start:end] / self.upper.diagonal()[start:end, None]).square_()
        allowed = self.keep[start:end]
        # On a CPU filling takes ten times as long as checking that there is nothing to fill.
        filled = not score.is_cpu or not allowed.view(torch.int8).amin()
        return score.masked_fill_(~allowed, -torch.inf) if filled else score


def obs_block(sweep: Sweep, start: int, end: int, choice: NOfM | None = None) -> None:
    """Prune columns ``start`` to ``end``, in place.

    Args:
        sweep: Up to date in these columns. Products are in the weight's dtype, float32 without
            TF32, which would change masks.
        start: First column.
        end: One past the last.
        choice: Which of the weights that ``keep`` allows are kept; None: all of them.
    """
    n, m = choice or (0, 1)
    _obs_block(*sweep, start, end, n, m)


def obs_block_reference(sweep: Sweep, start: int, end: int, choice: NOfM | None = None) -> None:
    """Do the same by rank-one updates, as in the published code.

    Args:
        sweep: Up to date in these columns.
        start: First column.
        end: One past the last.
        choice: n:m, or None.
    """
    work, errors, keep = (part[start:end] for part in sweep[:3])
    upper = sweep.upper[start:end, start:end]
    for j in range(end - start):
        if choice and j % choice.m == 0:
            score = sweep.score(start + j, start + j + choice.m)
            keep[j : j + choice.m] &= highest(without_nan(score), choice.n)
        errors[j] = torch.where(keep[j], 0, work[j] / upper[j, j])
        work[j:] -= upper[j, j:, None] * errors[j]
        work[j].masked_fill_(~keep[j], 0)


@torch.library.custom_op("prunekit::obs_block", mutates_args=("work", "errors", "keep"))
def _obs_block(
    work: Tensor,
    errors: Tensor,
    keep: Tensor,
    upper: Tensor,
    scale: Tensor | None,
    kind: str,
    start: int,
    end: int,
    n: int,
    m: int,
) -> None:
    sweep = Sweep(work, errors, keep, upper, scale, kind)
    with full_precision():
        if end == start:
            return
        if scale is not None or not (runs_triton(work) and work.dtype == torch.float32):
            _in_cache(sweep, start, end, NOfM(n, m) if n else None)
        elif m <= PANEL:
            _in_registers(sweep, start, end, n, m)
        else:
            sweep.halves(start, end, m, lambda first, last: _wide(sweep, first, last, n))


@_obs_block.register_fake
def _(
    work: Tensor,
    errors: Tensor,
    keep: Tensor,
    upper: Tensor,
    scale: Tensor | None,
    kind: str,
    start: int,
    end: int,
    n: int,
    m: int,
) -> None:
    pass


def _in_cache(sweep: Sweep, start: int, end: int, choice: NOfM | None) -> None:
    """Sweep a block in a copy with contiguous columns, where needed."""
    span = slice(start, end)
    work, keep = _contiguous(sweep.work[span]), _contiguous(sweep.keep[span])
    scale = None if sweep.scale is None else _contiguous(sweep.scale[span])
    upper = sweep.upper[span, span]
    block = Sweep(work, sweep.errors[span], keep, upper, scale, sweep.kind)
    leaf = max(LEAF // choice.m * choice.m, choice.m) if choice else LEAF
    columns = _columns if scale is None else _rounded_columns
    block.halves(0, end - start, leaf, lambda first, last: columns(block, first, last, choice))
    for whole, part in ((sweep.work, work), (sweep.keep, keep)):
        if part.data_ptr() != whole[start].data_ptr():
            whole[span] = part.T.contiguous().T


def _contiguous(part: Tensor) -> Tensor:
    """Return a contiguous copy, unless it already is.

    Transposing a dense matrix is several times as fast as copying a transposed one.
    """
    return part if part.is_contiguous() else part.T.contiguous().T.contiguous()


def _columns(sweep: Sweep, first: int, last: int, choice: NOfM | None) -> None:
    """Sweep a few columns one by one; a product updates each group."""
    work, errors, keep = (part[first:last] for part in sweep[:3])
    upper = sweep.upper[first:last, first:last]
    diagonal = upper.diagonal()[:, None]
    # Cost of each later column per unit of a pruned weight, so that errors are divided by U[j, j]
    # only at the end, all at once.
    costs = (upper / diagonal).T.contiguous()
    # All bits set where a weight is pruned, as in `zero`: NaN and inf too become exactly 0.
    integers = INTEGERS[work.itemsize]
    pruned = torch.empty_like(work, dtype=integers)
    parts = (work, errors, costs, work.view(integers), errors.view(integers), pruned)
    w, e, c, bits, error_bits, pruned_bits = arrays(*parts)
    together = choice.m if choice else TOGETHER
    for start in range(0, last - first, together):
        group = slice(start, min(start + together, last - first))
        if start:
            work[group].addmm_(costs[group, :start], errors[:start], alpha=-1)
        if choice:
            score = sweep.score(first + group.start, first + group.stop)
            keep[group] &= highest(without_nan(score), choice.n)
        pruned[group].copy_(keep[group].view(torch.int8)).sub_(1)
        for j in range(group.start, group.stop):
            error_bits[j] = bits[j] & pruned_bits[j]
            later = slice(j + 1, group.stop)
            w[later] -= c[later, j, None] * e[j]
    work.view(integers).bitwise_and_(pruned.bitwise_not_())
    errors /= diagonal


def _rounded_columns(sweep: Sweep, first: int, last: int, choice: NOfM | None) -> None:
    """Sweep a few columns one by one, and round kept weights."""
    assert sweep.scale is not None
    work, errors, keep = (part[first:last] for part in sweep[:3])
    scale, upper = sweep.scale[first:last], sweep.upper[first:last, first:last]
    diagonal = upper.diagonal()[:, None]
    costs = (upper / diagonal).T.contiguous()
    for j in range(last - first):
        if choice and j % choice.m == 0:
            score = sweep.score(first + j, first + j + choice.m)
            keep[j : j + choice.m] &= highest(without_nan(score), choice.n)
        rounded = nearest(work[j], scale[j], sweep.kind).masked_fill_(~keep[j], 0)
        torch.sub(work[j], rounded, out=errors[j])
        work[j] = rounded
        work[j + 1 :].addr_(costs[j + 1 :, j], errors[j], alpha=-1)
    errors /= diagonal


def _rows(outputs: int) -> int:
    """Return the rows of a program: one per thread.

    The interpreter, where programs cost time and rows do not, takes as many as possible.
    """
    if INTERPRETED:
        return min(triton.next_power_of_2(outputs), 4096)
    return 64 if torch.version.hip else 32


def _in_registers(sweep: Sweep, start: int, end: int, n: int, m: int) -> None:
    """Sweep a block by one launch, or two for a short panel."""
    panel = PANEL // m * m
    whole = end - (end - start) % panel
    if start < whole:
        _launch(sweep, start, whole, n, m, panel)
    if start < whole < end:
        sweep.compensate(start, whole, end)
    if whole < end:
        _launch(sweep, whole, end, n, m, end - whole)


def _wide(sweep: Sweep, start: int, end: int, n: int) -> None:
    """Sweep a group that is wider than a panel: select first."""
    m = end - start
    sweep.keep[start:end] &= choose(sweep.score(start, end).T, Groups(1, m, (m - n,))).T
    _in_registers(sweep, start, end, 0, 1)


def _launch(sweep: Sweep, start: int, end: int, n: int, m: int, panel: int) -> None:
    outputs = sweep.work.shape[1]
    if not outputs:
        return
    rows = _rows(outputs)
    # The factor may be stored by columns; the kernel reads its rows, number by number.
    upper = sweep.upper[start:end, start:end].contiguous()
    with torch.cuda.device_of(sweep.work):
        kernel[(triton.cdiv(outputs, rows),)](
            sweep.work, sweep.errors, sweep.keep.view(torch.uint8), upper, start, end, outputs,
            N=n, M=m, PANEL=panel, TILE_I=PANEL, TILE_O=rows,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
