"""Triton kernels of radix selection: count digits, find the threshold, write.

Shapes: O output features, I input features, G groups, P programs of a group. The state of a group
is three numbers: the prefix of its threshold, how many keys that agree with it are still to prune,
and how many there are. Status: a ticket for each group, and a number for each program.
"""

from prunekit_kernels._select_keys import key_of, score_at, write
from prunekit_kernels._triton import tl, triton


@triton.jit
def _entries(
    unit, group, O, I, WIDTH, ACROSS,  # noqa: E741
    SINGLE: tl.constexpr, FULL: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    """Return rows, columns, end and mask of a tile of a group."""
    o = (unit // ACROSS * TILE_O + tl.arange(0, TILE_O)[:, None]).to(tl.int64)
    i = (unit % ACROSS * TILE_I + tl.arange(0, TILE_I)[None, :]).to(tl.int64)
    end = tl.cast(WIDTH, tl.int64)
    if SINGLE:
        o += group
    else:
        i += group.to(tl.int64) * WIDTH
        end = tl.minimum((group.to(tl.int64) + 1) * WIDTH, I)
    if FULL:
        return o, i, end, tl.full((TILE_O, TILE_I), 1, tl.int1)
    return o, i, end, (o < O) & (i < end)


@triton.jit
def _clear_shared(BINS: tl.constexpr, WARPS: tl.constexpr):
    """Declare counts in shared memory, and set them to 0."""
    thread = tl.arange(0, 32 * WARPS)
    tl.inline_asm_elementwise(
        ".shared .align 16 .b32 prunekit_counts[2080]; mov.u32 $0, $1;", "=r,r",
        [thread], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.inline_asm_elementwise(
        "{ .reg .b32 a; mov.u32 a, prunekit_counts; shl.b32 $0, $1, 2; add.u32 a, a, $0;"
        " st.shared.b32 [a], 0; }", "=r,r",
        [tl.arange(0, BINS)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _add_shared(digit):
    """Count digits in shared memory."""
    tl.inline_asm_elementwise(
        "{ .reg .b32 a; mov.u32 a, prunekit_counts; shl.b32 $0, $1, 2;"
        " add.u32 a, a, $0; red.shared.add.u32 [a], 1; }", "=r,r",
        [digit], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _read_shared(BINS: tl.constexpr):
    """Return the counts in shared memory."""
    tl.debug_barrier()
    return tl.inline_asm_elementwise(
        "{ .reg .b32 a; mov.u32 a, prunekit_counts; shl.b32 $0, $1, 2; add.u32 a, a, $0;"
        " ld.shared.b32 $0, [a]; }", "=r,r",
        [tl.arange(0, BINS)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _pick(
    counts_ptr, state_ptr, pruned, pruned_ptr, group, prefix, BITS, LAST,
    FIRST: tl.constexpr, SAME: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Extend a prefix by the digit that reaches the count."""
    bins = tl.arange(0, BINS)
    ptrs = counts_ptr + group.to(tl.int64) * BINS + bins
    # Other programs added to them: what this multiprocessor has cached may be older.
    counts = tl.load(ptrs, cache_modifier=".cg").to(tl.int64)  # [BINS]
    tl.store(ptrs, tl.zeros((BINS,), tl.int32))
    state_ptr += group.to(tl.int64) * 3
    if FIRST:
        rest = tl.cast(pruned, tl.int64) if SAME else tl.load(pruned_ptr + group)
    else:
        rest = tl.load(state_ptr + 1)
    reached = tl.sum((tl.cumsum(counts, 0) < rest).to(tl.int32), 0)
    digit = tl.minimum(reached, (1 << BITS) - 1)
    rest -= tl.sum(tl.where(bins < digit, counts, 0), 0)
    prefix = (-tl.cast(1 << (BITS - 1), tl.int64) if FIRST else prefix << BITS) + digit
    # The bits below the last digit are 0, in negative keys 1.
    prefix = (prefix << LAST) | tl.where(prefix < 0, (1 << LAST) - 1, 0).to(tl.int64)
    tl.store(state_ptr, prefix)
    tl.store(state_ptr + 1, rest)
    tl.store(state_ptr + 2, tl.sum(tl.where(bins == digit, counts, 0), 0))


@triton.jit(
    do_not_specialize=["GROUPS", "PARTS", "SHARE", "TILES", "pruned", "SHIFT", "BITS", "LAST"]
)
def count_kernel(  # noqa: PLR0915  branches are resolved at compile time
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho,  # noqa: ARG001
    O, I, stride_x_o, stride_x_i, stride_out_o, stride_out_i,  # noqa: ARG001, E741
    stride_dual_o, stride_dual_i, WIDTH, GROUPS, PARTS, SHARE, TILES, ACROSS,
    pruned, pruned_ptr, counts_ptr, state_ptr, status_ptr, SHIFT, BITS, LAST,
    FIRST: tl.constexpr, SAME: tl.constexpr, BINS: tl.constexpr, PTX: tl.constexpr,
    WARPS: tl.constexpr, SINGLE: tl.constexpr, FULL: tl.constexpr,
    TILE_O: tl.constexpr, TILE_I: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Count a digit of the keys that agree with a prefix.

    The last program extends the prefix. The digit begins at bit ``SHIFT`` and has ``BITS``;
    ``LAST`` is the number of bits below the last digit, or 0 where another follows.
    """
    group, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    if FIRST:
        # For the kernel that writes.
        tl.store(status_ptr + GROUPS + tl.program_id(0), 0)
        tl.store(status_ptr + group, 0)
        prefix = tl.zeros((), tl.int64)
        base = -tl.cast(1 << (BITS - 1), tl.int64)  # this digit has the sign
    else:
        prefix = tl.load(state_ptr + group.to(tl.int64) * 3)
        base = prefix << BITS
    if PTX:
        _clear_shared(BINS, WARPS)
    total = tl.zeros((BINS,), tl.int32)
    for unit in range(part * SHARE, tl.minimum((part + 1) * SHARE, TILES)):
        o, i, _, inside = _entries(unit, group, O, I, WIDTH, ACROSS, SINGLE, FULL, TILE_O, TILE_I)
        score, _ = score_at(
            x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, i, O, I,
            stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "", KIND, SHARES, SCALED, FULL,
        )  # fmt: skip
        key = key_of(score)
        # The digits of other prefixes are outside 0 … 2ᴮᴵᵀˢ − 1.
        digit = (key >> SHIFT) - base.to(key.dtype)
        if PTX:
            # Each lane counts what is not wanted, and need not branch, in a number of its own
            # behind the bins. Bins from 2ᴮᴵᵀˢ on may count it too: no threshold lies there.
            other = BINS + ((tl.arange(0, TILE_I) >> 3) & 31)[None, :]
            if not FULL:
                digit = tl.where(inside, digit, other)
            unsigned = tl.uint64 if key.dtype == tl.int64 else tl.uint32
            _add_shared(tl.minimum(digit.to(unsigned), other.to(unsigned)).to(tl.int32))
        else:
            wanted = inside & (digit >= 0) & (digit < (1 << BITS))
            digit = tl.where(wanted, digit, 0).to(tl.int32)
            total += tl.histogram(tl.ravel(digit), BINS, tl.ravel(wanted))
    if PTX:
        total = _read_shared(BINS)
    bins = tl.arange(0, BINS)
    tl.atomic_add(
        counts_ptr + group.to(tl.int64) * BINS + bins, total, total > 0, sem="relaxed"
    )  # fmt: skip
    # All warps have added before this program counts as finished.
    tl.debug_barrier()
    arrived_ptr = counts_ptr + tl.cast(GROUPS, tl.int64) * BINS + group
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == PARTS - 1:
        tl.store(arrived_ptr, 0)
        _pick(
            counts_ptr, state_ptr, pruned, pruned_ptr, group, prefix, BITS, LAST,
            FIRST, SAME, BINS,
        )  # fmt: skip


@triton.jit
def _ties_before(
    x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, O, I,  # noqa: E741
    stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, WIDTH, SHARE, TILES, ACROSS,
    status_ptr, group, part, threshold,
    PARTS_2: tl.constexpr, SINGLE: tl.constexpr, FULL: tl.constexpr,
    TILE_O: tl.constexpr, TILE_I: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Publish this program's ties; return those of the programs before it."""
    ties = tl.zeros((TILE_O, TILE_I), tl.int32)
    for unit in range(part * SHARE, tl.minimum((part + 1) * SHARE, TILES)):
        o, i, _, inside = _entries(unit, group, O, I, WIDTH, ACROSS, SINGLE, FULL, TILE_O, TILE_I)
        score, _ = score_at(
            x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, i, O, I,
            stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "", KIND, SHARES, SCALED, FULL,
        )  # fmt: skip
        ties += ((key_of(score) == threshold) & inside).to(tl.int32)
    own = tl.sum(tl.sum(ties, 1), 0)
    # A published count is at least 1.
    tl.atomic_xchg(status_ptr + part, own + 1, sem="relaxed")
    earlier = tl.arange(0, PARTS_2)
    waiting = part > 0
    while waiting:
        # Each program before this one has started, and none waits before it publishes.
        published = tl.load(status_ptr + earlier, earlier < part, other=1, volatile=True)
        waiting = tl.min(published, 0) == 0
    published = tl.load(status_ptr + earlier, earlier < part, other=1, volatile=True)
    return tl.sum(published.to(tl.int64) - 1, 0)


@triton.jit
def _first_ties(tied, left):
    """Return the first ``left`` ties of a tile, row by row."""
    tied = tied.to(tl.int32)
    rows = tl.sum(tied, 1)
    rank = tl.cumsum(tied, 1) + (tl.cumsum(rows, 0) - rows)[:, None]
    return (tied != 0) & (rank <= left), tl.sum(rows, 0)


@triton.jit
def _write_mask(
    mask_ptr, stride_mask_o, stride_mask_b, o, i, end, O, first, keep, inside,  # noqa: E741
    PACKED: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    """Write the mask of a tile, as bits or as bytes."""
    if PACKED:
        bit = tl.reshape(keep.to(tl.int32), (TILE_O, TILE_I // 8, 8))
        byte = tl.sum(bit << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)
        b = first // 8 + tl.arange(0, TILE_I // 8)[None, :]
        filled = (o < O) & (b * 8 < end)
        tl.store(mask_ptr + o * stride_mask_o + b * stride_mask_b, byte, filled)
    else:
        ptrs = mask_ptr + o * stride_mask_o + i * stride_mask_b
        tl.store(ptrs, keep.to(tl.uint8), inside)


@triton.jit
def _write_tiles(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho, O, I,  # noqa: E741
    stride_x_o, stride_x_i, stride_out_o, stride_out_i, stride_dual_o, stride_dual_i,
    WIDTH, SHARE, TILES, ACROSS, mask_ptr, stride_mask_o, stride_mask_b,
    group, part, threshold, left,
    SOME: tl.constexpr, PACKED: tl.constexpr, SINGLE: tl.constexpr, FULL: tl.constexpr,
    TILE_O: tl.constexpr, TILE_I: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Write a program's tiles; of ties keep the first ``left``, or all if any."""
    for unit in range(part * SHARE, tl.minimum((part + 1) * SHARE, TILES)):
        o, i, end, inside = _entries(unit, group, O, I, WIDTH, ACROSS, SINGLE, FULL, TILE_O, TILE_I)
        score, value = score_at(
            x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, i, O, I,
            stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "", KIND, SHARES, SCALED, FULL,
        )  # fmt: skip
        key = key_of(score)
        tied = (key == threshold) & inside
        if SOME:
            kept, found = _first_ties(tied, left)
            left -= found
        else:
            kept = tied & (left > 0)
        keep = ((key > threshold) & inside) | kept
        write(
            out_ptr + o * stride_out_o + i * stride_out_i,
            dual_ptr + o * stride_dual_o + i * stride_dual_i, value, keep, rho, inside, KIND, FULL,
        )  # fmt: skip
        first = tl.cast(unit % ACROSS * TILE_I, tl.int64)
        if SINGLE == 0:
            first += group.to(tl.int64) * WIDTH
        _write_mask(
            mask_ptr, stride_mask_o, stride_mask_b, o, i, end, O, first, keep, inside,
            PACKED, TILE_O, TILE_I,
        )  # fmt: skip


@triton.jit(do_not_specialize=["GROUPS", "PARTS", "SHARE", "TILES"])
def write_kernel(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho, O, I,  # noqa: E741
    stride_x_o, stride_x_i, stride_out_o, stride_out_i, stride_dual_o, stride_dual_i,
    WIDTH, GROUPS, PARTS, SHARE, TILES, ACROSS,
    state_ptr, status_ptr, mask_ptr, stride_mask_o, stride_mask_b,
    PACKED: tl.constexpr, PARTS_2: tl.constexpr,
    SINGLE: tl.constexpr, FULL: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Write masks and weights by the thresholds of groups."""
    group, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    state_ptr += group.to(tl.int64) * 3
    threshold = tl.load(state_ptr)
    ties = tl.load(state_ptr + 2)
    # Ties that are kept, the first of the group: all but those still to prune.
    left = tl.maximum(ties - tl.load(state_ptr + 1), 0)
    if (left > 0) & (left < ties):
        # Programs that wait need those before them to have started.
        part = tl.atomic_add(status_ptr + group, 1, sem="relaxed")
        left -= _ties_before(
            x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, O, I,
            stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, WIDTH, SHARE, TILES, ACROSS,
            status_ptr + GROUPS + group * PARTS, group, part, threshold,
            PARTS_2, SINGLE, FULL, TILE_O, TILE_I, KIND, SHARES, SCALED,
        )  # fmt: skip
        _write_tiles(
            x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho, O, I,
            stride_x_o, stride_x_i, stride_out_o, stride_out_i, stride_dual_o, stride_dual_i,
            WIDTH, SHARE, TILES, ACROSS, mask_ptr, stride_mask_o, stride_mask_b,
            group, part, threshold, left,
            True, PACKED, SINGLE, FULL, TILE_O, TILE_I, KIND, SHARES, SCALED,  # noqa: FBT003
        )  # fmt: skip
    else:
        _write_tiles(
            x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho, O, I,
            stride_x_o, stride_x_i, stride_out_o, stride_out_i, stride_dual_o, stride_dual_i,
            WIDTH, SHARE, TILES, ACROSS, mask_ptr, stride_mask_o, stride_mask_b,
            group, part, threshold, left,
            False, PACKED, SINGLE, FULL, TILE_O, TILE_I, KIND, SHARES, SCALED,  # noqa: FBT003
        )  # fmt: skip
