"""Triton kernel of the OBS block: one thread per weight row.

Everything is transposed [I, O], so that a column of the weight is contiguous. A thread holds a
panel of columns in registers, selects and subtracts in it, and updates the next panel from the
errors that it stored; threads share nothing.
Shapes: O output features, I input features.
"""

from prunekit_kernels._triton import tl, triton


@triton.jit
def _row(x, index, i):
    """Return row ``index`` of x [TILE_I, TILE_O].

    The sum of integer zeros costs nothing once compiled.
    """
    bits = tl.where((i == index)[:, None], x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _choose(root, kept, group, i, first, N: tl.constexpr, M: tl.constexpr):
    """Return the keep words ``kept`` without a group's pruned entries.

    An entry is pruned that N or more of the M allowed entries beat.
    """
    score = root * root
    score = tl.where(score == score, score, -1.0)  # noqa: PLR0124  not NaN
    allowed = ((kept[None, :] >> i[:, None]) & 1) != 0
    score = tl.where(allowed, score, float("-inf"))
    beaten = tl.zeros_like(i[:, None] + kept[None, :])
    for k in tl.static_range(M):  # pyright: ignore
        other = _row(score, first + k, i)[None, :]
        wins = (other > score) | ((other == score) & (i > first + k)[:, None])
        beaten += wins.to(tl.int32)
    pruned = group[:, None] & allowed & (beaten >= N)
    return kept - tl.sum(tl.where(pruned, 1 << i[:, None], 0), 0)


# If the compiler knew that rows are aligned, it would give each thread four neighbouring rows,
# which take four times the registers.
@triton.jit(
    do_not_specialize_on_alignment=["work_ptr", "errors_ptr", "keep_ptr", "start", "end", "O"]
)
def kernel(
    work_ptr, errors_ptr, keep_ptr, upper_ptr, start, end, O,  # noqa: E741
    N: tl.constexpr, M: tl.constexpr, PANEL: tl.constexpr,
    TILE_I: tl.constexpr, TILE_O: tl.constexpr,
):  # fmt: skip
    o = (tl.program_id(0).to(tl.int64) * TILE_O + tl.arange(0, TILE_O))[None, :]
    i = tl.arange(0, TILE_I)
    inside = (i < PANEL)[:, None] & (o < O)
    size = end - start
    for first in range(start, end, PANEL):
        offsets = (first + i).to(tl.int64)[:, None] * O + o
        work = tl.load(work_ptr + offsets, inside, other=0.0)  # [TILE_I, TILE_O]
        # The keep bits of a row are one word, bit j for column first + j.
        kept = tl.load(keep_ptr + offsets, inside, other=0).to(tl.int32)
        kept = tl.sum(kept << i[:, None], 0)  # [TILE_O]
        u_ptr = upper_ptr + (first - start)
        for earlier in range(start, first, PANEL):
            earlier_offsets = (earlier + i).to(tl.int64)[:, None] * O + o
            error = tl.load(errors_ptr + earlier_offsets, inside, other=0.0)
            for j in tl.static_range(PANEL):  # pyright: ignore
                u = tl.load(u_ptr + i, i < PANEL, other=0.0)  # [TILE_I]
                work -= u[:, None] * _row(error, j, i)[None, :]
                u_ptr += size
        error = tl.zeros((TILE_I, TILE_O), tl.float32)
        for j in tl.static_range(PANEL):  # pyright: ignore
            if N > 0 and j % M == 0:
                group = (i >= j) & (i < j + M)
                u = tl.load(u_ptr + (i - j) * size + i, group, other=1.0)
                kept = _choose(work * (1.0 / u)[:, None], kept, group, i, j, N, M)
            u = tl.load(u_ptr + i, i < PANEL, other=0.0)
            inverse = 1.0 / tl.load(u_ptr + j)
            cost = tl.where(((kept >> j) & 1) != 0, 0.0, _row(work, j, i) * inverse)
            work -= u[:, None] * cost[None, :]
            error = tl.where((i == j)[:, None], cost[None, :], error)
            u_ptr += size
        keep = ((kept[None, :] >> i[:, None]) & 1) != 0
        tl.store(work_ptr + offsets, tl.where(keep, work, 0.0), inside)
        tl.store(errors_ptr + offsets, error, inside)
        tl.store(keep_ptr + offsets, keep.to(tl.uint8), inside)
        # The next panel reads these errors.
        tl.debug_barrier()
