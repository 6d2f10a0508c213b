"""Triton kernel of selection in rows that one program holds.

Shapes: O output features, I input features, B = ⌈I / 8⌉ bytes.
"""

from prunekit_kernels._select_keys import key_of, score_at, write
from prunekit_kernels._triton import tl, triton


@triton.jit
def _threshold(key, low, high, pruned, I):  # noqa: E741
    """Return the key at which pruning ends, how many are below it, and how many tie.

    It is the smallest that at least ``pruned`` keys do not exceed; where it separates exactly, no
    tie counts. Each step interpolates between the counts at both ends, and every fourth halves.
    """
    below = low * 0
    upto = below + I
    step = below
    while low < high:  # pyright: ignore
        span = high.to(tl.int64) - low
        share = (pruned - below).to(tl.float32) / (upto - below).to(tl.float32)
        ahead = (span.to(tl.float32) * share).to(tl.int64)
        ahead = tl.where(step % 4 == 3, span >> 1, tl.minimum(tl.maximum(ahead, 0), span - 1))
        middle = (low + ahead).to(tl.int32)
        count = tl.sum((key <= middle).to(tl.int32), 0)
        less = count < pruned
        below = tl.where(count <= pruned, count, below)
        upto = tl.where(less, upto, count)
        low = tl.where(less, middle + 1, tl.where(count == pruned, middle, low))
        high = tl.where(less, high, middle)
        step += 1
    return high, below, upto - below


@triton.jit
def row_kernel(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho, O, I,  # noqa: E741
    stride_x_o, stride_x_i, stride_out_o, stride_out_i, stride_dual_o, stride_dual_i,
    bits_ptr, stride_bits_o, stride_bits_b, pruned,
    TILE_I: tl.constexpr, PIECE: tl.constexpr, FULL: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Select within a row; one program per row."""
    # For a row of 32768 entries, 16 warps leave each thread 128 registers, of which keys take 64:
    # ptxas spills up to 200 bytes of the rest. Two programs per row would have to synchronize.
    o = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE_I)
    score, _ = score_at(
        x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, column.to(tl.int64), O, I,
        stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "evict_last", KIND, SHARES, SCALED,
        FULL,
    )  # fmt: skip
    key = key_of(score)
    highest = key
    if not FULL:
        # Above and below every key.
        key = tl.where(column < I, key, 0x7FFFFFFF)
        highest = tl.where(column < I, key, -0x7FFFFFFF)
    threshold, below, ties = _threshold(key, tl.min(key, 0), tl.max(highest, 0), pruned, I)
    # The first ties are kept; bisection finds the column at which they end, if some are pruned and
    # some are kept: of distinct keys none is.
    kept = below + ties - pruned
    cut = tl.where((kept == ties) & (kept > 0), TILE_I, 0)
    end = tl.where(kept > 0, TILE_I, 0)
    while cut < end:
        middle = (cut + end) >> 1
        enough = tl.sum(((key == threshold) & (column < middle)).to(tl.int32), 0) >= kept
        end = tl.where(enough, middle, end)
        cut = tl.where(enough, cut, middle + 1)
    # Weights are read again and written piece by piece: registers hold only the keys, and of long
    # rows they cannot be sliced.
    for start in range(0, TILE_I, PIECE):
        _write_piece(
            x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho, O, I,
            stride_x_o, stride_x_i, stride_out_o, stride_out_i, stride_dual_o, stride_dual_i,
            bits_ptr, stride_bits_o, stride_bits_b,
            o, start, key, threshold, cut, PIECE == TILE_I, PIECE, FULL, KIND, SHARES, SCALED,
        )  # fmt: skip


@triton.jit
def _write_piece(
    x_ptr, out_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, rho, O, I,  # noqa: E741
    stride_x_o, stride_x_i, stride_out_o, stride_out_i, stride_dual_o, stride_dual_i,
    bits_ptr, stride_bits_o, stride_bits_b, o, start, key, threshold, cut,
    WHOLE: tl.constexpr, PIECE: tl.constexpr, FULL: tl.constexpr,
    KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    column = start + tl.arange(0, PIECE)
    i = column.to(tl.int64)
    score, value = score_at(
        x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, i, O, I,
        stride_x_o, stride_x_i, stride_dual_o, stride_dual_i, "evict_first", KIND, SHARES, SCALED,
        FULL,
    )  # fmt: skip
    if not WHOLE:
        key = key_of(score)
    keep = (key > threshold) | ((key == threshold) & (column < cut))
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
