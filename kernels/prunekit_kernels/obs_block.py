"""OBS block: the columns of a sweep that are up to date, pruned one by one; one launch on CUDA.

Column j of the weight, with the factor U of :mod:`prunekit_kernels.inverse_factor`:

    e[:, j] = w[:, j] / U[j, j] where pruned, else 0
    w[:, j:] -= e[:, j] U[j, j:]

Source: Frantar & Alistarh, SparseGPT, Algorithm 1, arXiv:2301.00774.
Shapes: O output features, I input features. Everything is transposed, so that a column is
contiguous, and a row of the weight is one thread of the kernel: it holds a panel of 16 columns in
registers, chooses in it and subtracts in it, and brings the next panel up to date from the errors
that it wrote before; threads share nothing. Groups of more than a panel are chosen before their
columns are swept. The block reads and writes 9 bytes a weight and reads
4 bytes of errors for every panel that is to come: bound by instructions, not by memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit_kernels._precision import full_precision
from prunekit_kernels._triton import INTERPRETED, runs_triton, tl, triton
from prunekit_kernels.groups import Groups
from prunekit_kernels.packed_mask import INTEGERS
from prunekit_kernels.selection import arrays, choose, highest, without_nan

BLOCK = 128  # columns of a launch
LEAF = 16  # columns swept one by one between matrix products on a CPU: fastest of 8..32
TOGETHER = 4  # of them that one product brings up to date where n:m does not say how many
PANEL = 16  # columns that a thread of the kernel holds; 32 would not fit in its registers


class NOfM(NamedTuple):
    """n of every m neighbours in a row stay, chosen when the sweep comes to them.

    Higher scores stay, ties keep the lower index, NaN counts as lowest.
    """

    n: int
    m: int


class Sweep(NamedTuple):
    """The state of a sweep, transposed.

    Attributes:
        work: The weight; finished columns are exactly 0 where pruned. Of any strides on a CPU, as
            ``keep``; contiguous for a kernel.
        errors: What finished columns have left to make up for; of other columns never read.
        keep: In finished columns what stays, in others what may.
        upper: U.
    """

    work: Float[Tensor, "I O"]
    errors: Float[Tensor, "I O"]
    keep: Bool[Tensor, "I O"]
    upper: Float[Tensor, "I I"]

    def halves(self, start: int, end: int, unit: int, leaf: Callable[[int, int], None]) -> None:
        """Call ``leaf`` on every ``unit`` columns in turn, each time up to date."""
        if end - start <= unit:
            leaf(start, end)
            return
        units = -(-(end - start) // unit)
        middle = start + unit * (units // 2)
        self.halves(start, middle, unit, leaf)
        self.make_up(start, middle, end)
        self.halves(middle, end, unit, leaf)

    def make_up(self, start: int, middle: int, end: int) -> None:
        """Let the columns from ``middle`` on make up for the errors of those before it."""
        effect = self.upper[start:middle, middle:end].T
        self.work[middle:end].addmm_(effect, self.errors[start:middle], alpha=-1)

    def score(self, start: int, end: int) -> Float[Tensor, "C O"]:
        """Return w² / U[j, j]² of columns that are up to date; −inf where none may stay."""
        score = (self.work[start:end] / self.upper.diagonal()[start:end, None]).square_()
        may = self.keep[start:end]
        # On a CPU it takes ten times as long to fill as to see that there is nothing to fill.
        filled = score.is_cuda or not may.view(torch.int8).amin()
        return score.masked_fill_(~may, -torch.inf) if filled else score


def obs_block(sweep: Sweep, start: int, end: int, choice: NOfM | None = None) -> None:
    """Prune columns ``start`` to ``end``, in place, where ``keep`` or ``choice`` says so.

    Args:
        sweep: Up to date in these columns. Products are in the weight's type, float32 without TF32,
            which would change masks.
        start: First column.
        end: One past the last.
        choice: What stays of what ``keep`` allows; None for all of it.
    """
    n, m = choice or (0, 1)
    _obs_block(*sweep, start, end, n, m)


def obs_block_reference(sweep: Sweep, start: int, end: int, choice: NOfM | None = None) -> None:
    """Do the same as the published code does, by rank-one updates."""
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
    start: int,
    end: int,
    n: int,
    m: int,
) -> None:
    sweep = Sweep(work, errors, keep, upper)
    with full_precision():
        if end == start:
            return
        if not (runs_triton(work) and work.dtype == torch.float32):
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
    start: int,
    end: int,
    n: int,
    m: int,
) -> None:
    pass


def _in_cache(sweep: Sweep, start: int, end: int, choice: NOfM | None) -> None:
    """Sweep a block in a copy whose columns are contiguous, unless they are so as they stand."""
    span = slice(start, end)
    work, keep = _contiguous(sweep.work[span]), _contiguous(sweep.keep[span])
    block = Sweep(work, sweep.errors[span], keep, sweep.upper[span, span])
    leaf = max(LEAF // choice.m * choice.m, choice.m) if choice else LEAF
    block.halves(0, end - start, leaf, lambda first, last: _columns(block, first, last, choice))
    for whole, part in ((sweep.work, work), (sweep.keep, keep)):
        if part.data_ptr() != whole[start].data_ptr():
            whole[span] = part.T.contiguous().T


def _contiguous(part: Tensor) -> Tensor:
    """Return the same, contiguous; to transpose what is dense is several times as fast."""
    return part if part.is_contiguous() else part.T.contiguous().T.contiguous()


def _columns(sweep: Sweep, first: int, last: int, choice: NOfM | None) -> None:
    """Sweep a few columns one by one, groups of them brought up to date by a product."""
    work, errors, keep = (part[first:last] for part in sweep[:3])
    upper = sweep.upper[first:last, first:last]
    diagonal = upper.diagonal()[:, None]
    # What column j takes for each unit of a weight that went: so errors are divided by U[j, j] only
    # at the end, all at once.
    costs = (upper / diagonal).T.contiguous()
    # All bits where a weight goes, as in `zero`: NaN and inf too become exactly 0.
    integers = INTEGERS[work.itemsize]
    goes = torch.empty_like(work, dtype=integers)
    parts = (work, errors, costs, work.view(integers), errors.view(integers), goes)
    w, e, c, bits, gone, all_bits = arrays(*parts)
    together = choice.m if choice else TOGETHER
    for start in range(0, last - first, together):
        group = slice(start, min(start + together, last - first))
        if start:
            work[group].addmm_(costs[group, :start], errors[:start], alpha=-1)
        if choice:
            score = sweep.score(first + group.start, first + group.stop)
            keep[group] &= highest(without_nan(score), choice.n)
        goes[group].copy_(keep[group].view(torch.int8)).sub_(1)
        for j in range(group.start, group.stop):
            gone[j] = bits[j] & all_bits[j]
            later = slice(j + 1, group.stop)
            w[later] -= c[later, j, None] * e[j]
    work.view(integers).bitwise_and_(goes.bitwise_not_())
    errors /= diagonal


def _rows(outputs: int) -> int:
    """Rows of a program: one a thread; in the interpreter, where programs cost and rows do not."""
    if INTERPRETED:
        return min(triton.next_power_of_2(outputs), 4096)
    return 64 if torch.version.hip else 32


def _in_registers(sweep: Sweep, start: int, end: int, n: int, m: int) -> None:
    """Sweep a block by one launch, or two where its last columns do not fill a panel."""
    panel = PANEL // m * m
    whole = end - (end - start) % panel
    if start < whole:
        _launch(sweep, start, whole, n, m, panel)
    if start < whole < end:
        sweep.make_up(start, whole, end)
    if whole < end:
        _launch(sweep, whole, end, n, m, end - whole)


def _wide(sweep: Sweep, start: int, end: int, n: int) -> None:
    """Sweep a group that is wider than a panel, and than what a thread can hold: choose first."""
    m = end - start
    sweep.keep[start:end] &= choose(sweep.score(start, end).T, Groups(1, m, (m - n,))).T
    _in_registers(sweep, start, end, 0, 1)


def _launch(sweep: Sweep, start: int, end: int, n: int, m: int, panel: int) -> None:
    outputs = sweep.work.shape[1]
    if not outputs:
        return
    rows = _rows(outputs)
    # The factor may be stored by columns; the kernel reads short rows of it, four numbers at once.
    upper = sweep.upper[start:end, start:end].contiguous()
    with torch.cuda.device_of(sweep.work):
        _kernel[(triton.cdiv(outputs, rows),)](
            sweep.work, sweep.errors, sweep.keep.view(torch.uint8), upper, start, end, outputs,
            N=n, M=m, PANEL=panel, TILE_I=PANEL, TILE_O=rows,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def _row(x, index, i):
    """Row ``index`` of x [TILE_I, TILE_O]: to add integer zeros costs nothing once compiled."""
    bits = tl.where((i == index)[:, None], x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _choose(root, stays, group, i, first, N: tl.constexpr, M: tl.constexpr):
    """Of ``stays``, a word a row, clear the bits of a group that N or more of the M others beat."""
    score = root * root
    score = tl.where(score == score, score, -1.0)  # noqa: PLR0124  NaN is not
    may = ((stays[None, :] >> i[:, None]) & 1) != 0
    score = tl.where(may, score, float("-inf"))
    beaten = tl.zeros_like(i[:, None] + stays[None, :])
    for k in tl.static_range(M):  # pyright: ignore
        other = _row(score, first + k, i)[None, :]
        wins = (other > score) | ((other == score) & (i > first + k)[:, None])
        beaten += wins.to(tl.int32)
    goes = group[:, None] & may & (beaten >= N)
    return stays - tl.sum(tl.where(goes, 1 << i[:, None], 0), 0)


# Were the compiler told that rows are aligned, it would give each thread four neighbouring ones,
# which need four times the registers.
@triton.jit(
    do_not_specialize_on_alignment=["work_ptr", "errors_ptr", "keep_ptr", "start", "end", "O"]
)
def _kernel(
    work_ptr, errors_ptr, keep_ptr, upper_ptr, start, end, O,  # noqa: E741
    N: tl.constexpr, M: tl.constexpr, PANEL: tl.constexpr,
    TILE_I: tl.constexpr, TILE_O: tl.constexpr,
):  # fmt: skip
    o = (tl.program_id(0).to(tl.int64) * TILE_O + tl.arange(0, TILE_O))[None, :]
    i = tl.arange(0, TILE_I)
    inside = (i < PANEL)[:, None] & (o < O)
    size = end - start
    for first in range(start, end, PANEL):
        spot = (first + i).to(tl.int64)[:, None] * O + o
        work = tl.load(work_ptr + spot, inside, other=0.0)
        # What stays of a row is one word, bit j for column first + j.
        stays = tl.load(keep_ptr + spot, inside, other=0).to(tl.int32)
        stays = tl.sum(stays << i[:, None], 0)
        u_ptr = upper_ptr + (first - start)
        for earlier in range(start, first, PANEL):
            before = (earlier + i).to(tl.int64)[:, None] * O + o
            error = tl.load(errors_ptr + before, inside, other=0.0)
            for j in tl.static_range(PANEL):  # pyright: ignore
                u = tl.load(u_ptr + i, i < PANEL, other=0.0)
                work -= u[:, None] * _row(error, j, i)[None, :]
                u_ptr += size
        error = tl.zeros((TILE_I, TILE_O), tl.float32)
        for j in tl.static_range(PANEL):  # pyright: ignore
            if N > 0 and j % M == 0:
                group = (i >= j) & (i < j + M)
                u = tl.load(u_ptr + (i - j) * size + i, group, other=1.0)
                stays = _choose(work * (1.0 / u)[:, None], stays, group, i, j, N, M)
            u = tl.load(u_ptr + i, i < PANEL, other=0.0)
            inverse = 1.0 / tl.load(u_ptr + j)
            cost = tl.where(((stays >> j) & 1) != 0, 0.0, _row(work, j, i) * inverse)
            work -= u[:, None] * cost[None, :]
            error = tl.where((i == j)[:, None], cost[None, :], error)
            u_ptr += size
        kept = ((stays[None, :] >> i[:, None]) & 1) != 0
        tl.store(work_ptr + spot, tl.where(kept, work, 0.0), inside)
        tl.store(errors_ptr + spot, error, inside)
        tl.store(keep_ptr + spot, kept.to(tl.uint8), inside)
        # The next panel reads these errors.
        tl.debug_barrier()
