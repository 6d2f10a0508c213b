"""Triton kernel of selection in rows that one program holds.

Shapes: O output features, I input features, B = ⌈I / 8⌉ bytes.
"""

from prunekit_kernels._select_keys import key_of, score_at, write
from prunekit_kernels._triton import tl, triton


@triton.jit
def _upto(scores, limit, PIECES: tl.constexpr):
    """Return how many scores are at most ``limit``.

    Floats are compared to a float, and added, in one instruction each; whole numbers would take
    three.
    """
    total = (scores[0] <= limit).to(tl.float32)
    for piece in tl.static_range(1, PIECES):  # pyright: ignore
        total += (scores[piece] <= limit).to(tl.float32)
    return tl.sum(total, 0).to(tl.int32)


@triton.jit
def _ties_upto(scores, threshold, end, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Return how many scores before column ``end`` are the threshold."""
    column = tl.arange(0, PIECE)
    total = ((scores[0] == threshold) & (column < end)).to(tl.int32)
    for piece in tl.static_range(1, PIECES):  # pyright: ignore
        total += ((scores[piece] == threshold) & (column < end - piece * PIECE)).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _score_of(key):
    """Return the score of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _threshold(scores, low, high, pruned, I, PIECES: tl.constexpr):  # noqa: E741
    """Return the threshold, its number of lower scores and of ties.

    It is the smallest that at least ``pruned`` scores do not exceed; where it separates exactly, no
    tie counts. Each step interpolates in the keys of both ends between the counts there, and every
    fourth halves.
    """
    low = key_of(low)
    high = key_of(high)
    below = low * 0
    upto = below + I
    step = below
    while low < high:  # pyright: ignore
        span = (high - low).to(tl.uint32)
        share = (pruned - below).to(tl.float32) / (upto - below).to(tl.float32)
        # Below 1, so that no product exceeds 32 bits.
        ahead = (span.to(tl.float32) * tl.minimum(share, 0.9999)).to(tl.uint32)
        ahead = tl.where(step % 4 == 3, span >> 1, tl.minimum(ahead, span - 1))
        middle = low + ahead.to(tl.int32)
        count = _upto(scores, _score_of(middle), PIECES)
        less = count < pruned
        below = tl.where(count <= pruned, count, below)
        upto = tl.where(less, upto, count)
        low = tl.where(less, middle + 1, tl.where(count == pruned, middle, low))
        high = tl.where(less, high, middle)
        step += 1
    return _score_of(high), below, upto - below


@triton.jit
def _gathered(
    x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, O, I,  # noqa: E741
    stride_x_o, stride_x_i, stride_dual_o, stride_dual_i,
    PIECE: tl.constexpr, PIECES: tl.constexpr, FULL: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Return the scores of a row in pieces, the least and the most.

    Of a long row they are computed piece by piece: the barrier keeps the loads of the next from
    being moved ahead, for which a row of 32768 entries leaves no registers.
    """
    scores = ()
    for piece in tl.static_range(PIECES):  # pyright: ignore
        column = piece * PIECE + tl.arange(0, PIECE)
        score, _ = score_at(
            x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, column.to(tl.int64),
            O, I, stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "evict_last",
            KIND, SHARES, SCALED, FULL,
        )  # fmt: skip
        # NaN is as low as −∞: the maximum of it and a number is the number.
        score = tl.maximum(score, float("-inf"))
        lowest, highest = score, score
        if not FULL:
            # NaN is neither counted nor kept.
            lowest = tl.where(column < I, score, float("inf"))
            highest = tl.where(column < I, score, float("-inf"))
            score = tl.where(column < I, score, float("nan"))
        if piece == 0:
            least, most = lowest, highest
        else:
            least = tl.minimum(least, lowest)  # pyright: ignore
            most = tl.maximum(most, highest)  # pyright: ignore
        scores = scores + (score,)  # noqa: RUF005  the compiler has no unpacking
        if PIECES > 1:
            tl.debug_barrier()
    return scores, tl.min(least, 0), tl.max(most, 0)  # pyright: ignore


@triton.jit
def row_kernel(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho, O, I,  # noqa: E741
    stride_x_o, stride_x_i, stride_out_o, stride_out_i, stride_dual_o, stride_dual_i,
    bits_ptr, stride_bits_o, stride_bits_b, pruned,
    TILE_I: tl.constexpr, PIECE: tl.constexpr, FULL: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Select within a row; one program per row."""
    # For a row of 32768 entries, 16 warps leave each thread 128 registers, of which scores take 64:
    # ptxas spills up to 64 bytes of the rest. Two programs per row would have to synchronize.
    PIECES: tl.constexpr = TILE_I // PIECE
    o = tl.program_id(0).to(tl.int64)
    scores, least, most = _gathered(
        x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, O, I,
        stride_x_o, stride_x_i, stride_dual_o, stride_dual_i,
        PIECE, PIECES, FULL, KIND, SHARES, SCALED,
    )  # fmt: skip
    threshold, below, ties = _threshold(scores, least, most, pruned, I, PIECES)
    # The first ties are kept; bisection finds the column at which they end, if some are pruned and
    # some are kept: of distinct keys none is.
    kept = below + ties - pruned
    cut = tl.where((kept == ties) & (kept > 0), TILE_I, 0)
    end = tl.where(kept > 0, TILE_I, 0)
    while cut < end:
        middle = (cut + end) >> 1
        enough = _ties_upto(scores, threshold, middle, PIECE, PIECES) >= kept
        end = tl.where(enough, middle, end)
        cut = tl.where(enough, cut, middle + 1)
    # Weights are read again, from the cache: registers hold only the scores.
    for piece in tl.static_range(PIECES):  # pyright: ignore
        if PIECES > 1:
            tl.debug_barrier()
        _write_piece(
            x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho, O, I,
            stride_x_o, stride_x_i, stride_out_o, stride_out_i, stride_dual_o, stride_dual_i,
            bits_ptr, stride_bits_o, stride_bits_b,
            o, piece * PIECE, scores[piece], threshold, cut, PIECE, FULL, KIND, SHARES, SCALED,
        )  # fmt: skip


@triton.jit
def _write_piece(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho, O, I,  # noqa: E741
    stride_x_o, stride_x_i, stride_out_o, stride_out_i, stride_dual_o, stride_dual_i,
    bits_ptr, stride_bits_o, stride_bits_b, o, start, score, threshold, cut,
    PIECE: tl.constexpr, FULL: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    column = start + tl.arange(0, PIECE)
    i = column.to(tl.int64)
    _, value = score_at(
        x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, i, O, I,
        stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "evict_first", KIND, SHARES, SCALED,
        FULL,
    )  # fmt: skip
    keep = (score > threshold) | ((score == threshold) & (column < cut))
    if not FULL:
        keep = keep & (column < I)
    out_ptrs = out_ptr + o * stride_out_o + i * stride_out_i
    dual_ptrs = dual_ptr + o * stride_dual_o + i * stride_dual_i
    write(out_ptrs, dual_ptrs, value, keep, rho, column < I, KIND, FULL)
    bit = tl.reshape(keep.to(tl.int32), (PIECE // 8, 8)) << tl.arange(0, 8)[None, :]
    b = start // 8 + tl.arange(0, PIECE // 8)
    bits_ptrs = bits_ptr + o * stride_bits_o + b * stride_bits_b
    if FULL:
        tl.store(bits_ptrs, tl.sum(bit, 1).to(tl.uint8))
    else:
        tl.store(bits_ptrs, tl.sum(bit, 1).to(tl.uint8), b * 8 < I)
