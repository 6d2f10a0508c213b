"""What the kernels of selection share: reading scores, ordering them, writing what was chosen."""

from prunekit_kernels._triton import tl, triton

SCORE, WEIGHT, DUAL = 0, 1, 2
"""The kinds of source; see ``Source`` in :mod:`prunekit_kernels._select`."""


@triton.jit
def score_at(
    x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse, o, i, O, I,  # noqa: E741
    x_o, x_i, dual_o, dual_i,
    EVICTION: tl.constexpr, KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Return the scores at rows o and columns i, and the values they belong to.

    They are float32; given as they are to be compared (``SCORE``), float64 stays so.
    """
    inside = (o < O) & (i < I)
    value = tl.load(x_ptr + o * x_o + i * x_i, inside, other=0.0, eviction_policy=EVICTION)
    score = value if value.dtype == tl.float64 else value.to(tl.float32)
    if KIND == 2:
        spot = dual_ptr + o * dual_o + i * dual_i
        value = score + tl.load(spot, inside, other=0.0, eviction_policy=EVICTION) * inverse
        score = tl.abs(value)
    if KIND == 1:
        score = tl.abs(score)
        if SHARES:
            row = tl.load(row_ptr + o, o < O, other=0.0)
            score = score * (row + tl.load(column_ptr + i, i < I, other=0.0))
        if SCALED:
            score = score * tl.load(scale_ptr + i, i < I, other=0.0)
    return score, value


@triton.jit
def key_of(score):
    """Return integers of the same order and size; −0 equals 0 and NaN equals −inf."""
    if score.dtype == tl.float64:
        bits = (score + 0.0).to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        key = tl.where(score == score, key, -9218868437227405313)  # noqa: PLR0124  that of −inf
    else:
        bits = (score + 0.0).to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = tl.where(score == score, key, -2139095041)  # noqa: PLR0124  that of −inf
    return key


@triton.jit
def write(out_spot, dual_spot, value, keep, rho, inside, KIND: tl.constexpr):
    """Write what stays, zeros elsewhere, and of ``DUAL`` what the dual becomes."""
    if KIND != 0:
        tl.store(out_spot, tl.where(keep, value, 0.0).to(out_spot.dtype.element_ty), inside)
    if KIND == 2:
        tl.store(dual_spot, tl.where(keep, 0.0, value * rho), inside)
