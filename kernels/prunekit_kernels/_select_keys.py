"""Triton functions shared by the selection kernels: load scores, order them, write."""

from prunekit_kernels._triton import tl, triton

SCORE, WEIGHT, DUAL = 0, 1, 2
"""Kinds of source; see :class:`prunekit_kernels._source.Source`."""


@triton.jit
def _load(ptrs, inside, EVICTION: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        return tl.load(ptrs, eviction_policy=EVICTION)
    return tl.load(ptrs, inside, other=0.0, eviction_policy=EVICTION)


@triton.jit
def score_at(
    x_ptr, dual_ptr, row_ptr, column_ptr, scale_ptr, inverse_rho, o, i, O, I,  # noqa: E741
    stride_x_o, stride_x_i, stride_dual_o, stride_dual_i,
    EVICTION: tl.constexpr, KIND: tl.constexpr, SHARES: tl.constexpr, SCALED: tl.constexpr,
    FULL: tl.constexpr = False,  # noqa: FBT002  the interpreter passes it by position
):  # fmt: skip
    """Return scores and scored values at rows and columns.

    ``o`` and ``i`` are int64 and broadcast to the shape of the result; ``FULL`` says that all are
    inside the matrix. Scores are float32, or float64 where ``SCORE`` reads them so; the other
    arguments are those of :class:`_source.Source`.
    """
    inside = (o < O) & (i < I)
    value = _load(x_ptr + o * stride_x_o + i * stride_x_i, inside, EVICTION, FULL)
    score = value if value.dtype == tl.float64 else value.to(tl.float32)
    if KIND == 2:
        ptrs = dual_ptr + o * stride_dual_o + i * stride_dual_i
        value = score + _load(ptrs, inside, EVICTION, FULL) * inverse_rho
        score = tl.abs(value)
    if KIND == 1:
        if value.dtype == tl.bfloat16:
            # The absolute value of two numbers at once, which the compiler does not find.
            bits = (value.to(tl.int16, bitcast=True) & 0x7FFF).to(tl.int32) << 16
            score = bits.to(tl.float32, bitcast=True)
        else:
            score = tl.abs(score)
        if SHARES:
            row = _load(row_ptr + o, o < O, "", FULL)
            score = score * (row + _load(column_ptr + i, i < I, "", FULL))
        if SCALED:
            score = score * _load(scale_ptr + i, i < I, "", FULL)
    return score, value


@triton.jit
def key_of(score):
    """Return integer keys of the same order and size as the scores.

    −0 gets the key of 0, and NaN that of −inf.
    """
    # The maximum of NaN and a number is the number.
    score = tl.maximum(score + 0.0, float("-inf"))
    if score.dtype == tl.float64:
        bits = score.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = score.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return key


@triton.jit
def write(
    out_ptrs, dual_ptrs, value, keep, rho, inside, KIND: tl.constexpr,
    FULL: tl.constexpr = False,  # noqa: FBT002
):  # fmt: skip
    """Write kept values, zeros elsewhere, and for ``DUAL`` the new dual.

    Args:
        out_ptrs: Pointers of the outputs.
        dual_ptrs: Pointers of the dual.
        value: The values, float32.
        keep: True where a value is kept.
        rho: Penalty, the factor of the new dual.
        inside: True inside the matrix.
        KIND: Kind of source; ``SCORE`` writes nothing.
        FULL: Whether ``inside`` is true everywhere.
    """
    if KIND != 0:
        _store(out_ptrs, tl.where(keep, value, 0.0).to(out_ptrs.dtype.element_ty), inside, FULL)
    if KIND == 2:
        _store(dual_ptrs, tl.where(keep, 0.0, value * rho), inside, FULL)


@triton.jit
def _store(ptrs, value, inside, FULL: tl.constexpr):
    if FULL:
        tl.store(ptrs, value)
    else:
        tl.store(ptrs, value, inside)
