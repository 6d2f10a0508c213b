"""Triton kernels of salience: sums over tokens, and their merge.

Shapes: T tokens, F columns, P parts of the tokens.
"""

from prunekit_kernels._triton import tl, triton


@triton.jit
def _merge_moments(na, ma, a2, a3, a4, nb, mb, b2, b3, b4):
    """Merge counts, means and central moments by Pébay's formulas."""
    n = na + nb
    inverse = tl.where(n > 0, 1.0 / tl.where(n > 0, n, 1.0), 0.0)
    d = mb - ma
    dn = d * inverse
    dn2 = dn * dn
    both = na * nb
    mean = ma + nb * dn
    m2 = a2 + b2 + d * dn * both
    m3 = a3 + b3 + d * dn2 * both * (na - nb) + 3.0 * dn * (na * b2 - nb * a2)
    m4 = a4 + b4 + d * dn2 * dn * both * (na * na - both + nb * nb)
    m4 += 6.0 * dn2 * (na * na * b2 + nb * nb * a2) + 4.0 * dn * (na * b3 - nb * a3)
    return n, mean, m2, m3, m4


@triton.jit
def _inverse(top):
    """Return 2⁻ᵏ for the largest 2ᵏ ≤ top, and 0 for 0."""
    bits = top.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
    inverse = (2130706432 - bits).to(tl.float32, bitcast=True)
    return tl.where(top > 0, inverse, 0.0)


@triton.jit
def _load_valid(valid_ptr, t, T, stride_valid, PADDED: tl.constexpr):
    """Return True for tokens that count."""
    inside_t = t < T
    if PADDED:
        inside_t = inside_t & (tl.load(valid_ptr + t * stride_valid, inside_t, other=0) != 0)
    return inside_t


@triton.jit
def _first_values(
    h_ptr, g_ptr, valid_ptr, first, lane, f, T, F,
    stride_h_t, stride_h_f, stride_g_t, stride_g_f, stride_valid, zero,
    GRADIENTS: tl.constexpr, PADDED: tl.constexpr, STRIDE: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    """Return each lane's sum / STRIDE, largest magnitudes and count."""
    total = zero
    top_h = zero
    top_g = zero
    count = tl.zeros((TILE_T, 1), tl.float32)
    for step in tl.range(0, STRIDE):  # pyright: ignore
        t = first + step * TILE_T + lane
        inside_t = _load_valid(valid_ptr, t, T, stride_valid, PADDED)
        inside = inside_t & (f < F)
        ptrs = h_ptr + t * stride_h_t + f * stride_h_f
        h = tl.load(ptrs, inside, other=0.0).to(tl.float32)  # [TILE_T, TILE_F]
        top_h = tl.maximum(top_h, tl.abs(h))
        total += h * (1.0 / STRIDE)
        count += inside_t.to(tl.float32)
        if GRADIENTS:
            ptrs = g_ptr + t * stride_g_t + f * stride_g_f
            g = tl.load(ptrs, inside, other=0.0).to(tl.float32)  # [TILE_T, TILE_F]
            top_g = tl.maximum(top_g, tl.abs(g))
    return total, top_h, top_g, count


@triton.jit
def _power_sums(
    h_ptr, g_ptr, valid_ptr, first, lane, f, T, F, stride_h_t, stride_h_f, stride_g_t, stride_g_f,
    stride_valid, zero, mean, scale_h, scale_g, sum_h, sum_g, sum_hg, sum_hg2,
    GRADIENTS: tl.constexpr, PADDED: tl.constexpr, MOMENTS: tl.constexpr, PRODUCTS: tl.constexpr,
    STRIDE: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    """Return the powers of one stride around ``mean``, and absolute sums."""
    s1, s2, s3, s4 = zero, zero, zero, zero
    count = tl.zeros((TILE_T, 1), tl.float32)
    for step in tl.range(0, STRIDE, num_stages=4):  # pyright: ignore
        t = first + step * TILE_T + lane
        inside_t = _load_valid(valid_ptr, t, T, stride_valid, PADDED)
        inside = inside_t & (f < F)
        ptrs = h_ptr + t * stride_h_t + f * stride_h_f
        h = tl.load(ptrs, inside, other=0.0).to(tl.float32) * scale_h  # [TILE_T, TILE_F]
        d = tl.where(inside, h - mean, 0.0)
        s1 += d
        if MOMENTS:
            d2 = d * d
            s2 += d2
            s3 += d2 * d
            s4 += d2 * d2
        count += inside_t.to(tl.float32)
        sum_h += tl.abs(h)
        if GRADIENTS:
            ptrs = g_ptr + t * stride_g_t + f * stride_g_f
            g = tl.load(ptrs, inside, other=0.0).to(tl.float32) * scale_g  # [TILE_T, TILE_F]
            sum_g += tl.abs(g)
            if PRODUCTS:
                product = tl.abs(h * g)
                sum_hg += product
                sum_hg2 += product * product
    return count, s1, s2, s3, s4, sum_h, sum_g, sum_hg, sum_hg2


@triton.jit
def _recentre(n, mean, m2, m3, m4):
    """Return the total count, and the lanes' moments around their common mean."""
    total = tl.sum(n, 0)[None, :]
    common = tl.sum(n * mean, 0)[None, :] / tl.maximum(total, 1.0)
    # A second time, from the remainder, so that a large mean is not rounded away.
    common += tl.sum(n * (mean - common), 0)[None, :] / tl.maximum(total, 1.0)
    d = tl.where(n > 0, mean - common, 0.0)
    d2 = d * d
    m4 += d * (4.0 * m3 + d * (6.0 * m2 + n * d2))
    m3 += d * (3.0 * m2 + n * d2)
    m2 += n * d2
    return total, common, m2, m3, m4


@triton.jit
def _store_part(
    partial_ptr, part, f, F, n, mean, m2, m3, m4, sum_h, sum_g, sum_hg, sum_hg2, scale_h, scale_g,
    TILE_F: tl.constexpr,
):  # fmt: skip
    """Store the nine sums over lanes, scaled back, as float64."""
    u = 1.0 / tl.where(scale_h > 0, scale_h, 1.0).to(tl.float64)
    v = u / tl.where(scale_g > 0, scale_g, 1.0).to(tl.float64)
    ptrs = partial_ptr + part * 9 * F + f
    inside = f < F
    tl.store(ptrs, tl.zeros((1, TILE_F), tl.float64) + n, inside)
    tl.store(ptrs + F, mean.to(tl.float64) * u, inside)
    tl.store(ptrs + 2 * F, tl.sum(m2, 0)[None, :].to(tl.float64) * (u * u), inside)
    tl.store(ptrs + 3 * F, tl.sum(m3, 0)[None, :].to(tl.float64) * (u * u * u), inside)
    tl.store(ptrs + 4 * F, tl.sum(m4, 0)[None, :].to(tl.float64) * (u * u * u * u), inside)
    tl.store(ptrs + 5 * F, tl.sum(sum_h, 0)[None, :].to(tl.float64) * u, inside)
    tl.store(ptrs + 6 * F, tl.sum(sum_g, 0)[None, :].to(tl.float64) * (v / u), inside)
    tl.store(ptrs + 7 * F, tl.sum(sum_hg, 0)[None, :].to(tl.float64) * v, inside)
    tl.store(ptrs + 8 * F, tl.sum(sum_hg2, 0)[None, :].to(tl.float64) * (v * v), inside)


@triton.jit
def _load_moments(ptrs, stride, inside):
    """Load count, mean and the second to fourth central moments."""
    return (
        tl.load(ptrs, inside, other=0.0),
        tl.load(ptrs + stride, inside, other=0.0),
        tl.load(ptrs + 2 * stride, inside, other=0.0),
        tl.load(ptrs + 3 * stride, inside, other=0.0),
        tl.load(ptrs + 4 * stride, inside, other=0.0),
    )


@triton.jit
def part_kernel(
    h_ptr, g_ptr, valid_ptr, partial_ptr, T, F,
    stride_h_t, stride_h_f, stride_g_t, stride_g_f, stride_valid,
    GRADIENTS: tl.constexpr, PADDED: tl.constexpr, MOMENTS: tl.constexpr, PRODUCTS: tl.constexpr,
    PART: tl.constexpr, STRIDE: tl.constexpr, TILE_T: tl.constexpr, TILE_F: tl.constexpr,
):  # fmt: skip
    # Every lane [TILE_T, TILE_F] sums powers around its current mean, then merges them.
    f = tl.program_id(0).to(tl.int64) * TILE_F + tl.arange(0, TILE_F)[None, :]
    part = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, TILE_T)[:, None]
    zero = tl.zeros((TILE_T, TILE_F), tl.float32)
    n = tl.zeros((TILE_T, 1), tl.float32)
    mean, m2, m3, m4 = zero, zero, zero, zero
    sum_h, sum_g, sum_hg, sum_hg2 = zero, zero, zero, zero
    # Sums of magnitudes need no scale; powers and products do.
    scale_h = tl.cast(0.0 if MOMENTS or PRODUCTS else 1.0, tl.float32)
    scale_g = tl.cast(0.0 if MOMENTS or PRODUCTS else 1.0, tl.float32)
    tokens = tl.minimum(T - part * PART, PART).to(tl.int32)
    for start in tl.range(0, tokens, STRIDE * TILE_T):  # pyright: ignore
        if MOMENTS or PRODUCTS:  # noqa: SIM102  decided by the compiler
            if (tl.min(tl.min(n, 1), 0) == 0) | (scale_h == 0) | (GRADIENTS and scale_g == 0):
                # A lane's first valid tokens are read twice, since there is no mean to begin
                # with; so are a program's first nonzero ones, which set its scale.
                first, top_h, top_g, count = _first_values(
                    h_ptr, g_ptr, valid_ptr, part * PART + start, lane, f, T, F,
                    stride_h_t, stride_h_f, stride_g_t, stride_g_f, stride_valid, zero,
                    GRADIENTS, PADDED, STRIDE, TILE_T,
                )  # fmt: skip
                scale_h = tl.where(scale_h > 0, scale_h, _inverse(tl.max(tl.max(top_h, 1), 0)))
                scale_g = tl.where(scale_g > 0, scale_g, _inverse(tl.max(tl.max(top_g, 1), 0)))
                first = first * scale_h * (STRIDE / tl.maximum(count, 1.0))
                mean = tl.where(n > 0, mean, first)
        count, s1, s2, s3, s4, sum_h, sum_g, sum_hg, sum_hg2 = _power_sums(
            h_ptr, g_ptr, valid_ptr, part * PART + start, lane, f, T, F, stride_h_t, stride_h_f,
            stride_g_t, stride_g_f, stride_valid, zero, mean, scale_h, scale_g,
            sum_h, sum_g, sum_hg, sum_hg2, GRADIENTS, PADDED, MOMENTS, PRODUCTS, STRIDE, TILE_T,
        )  # fmt: skip
        if MOMENTS:
            inverse = tl.where(count > 0, 1.0 / tl.where(count > 0, count, 1.0), 0.0)
            u = s1 * inverse
            b2 = tl.maximum(s2 - u * s1, 0.0)
            b3 = s3 - u * (3.0 * s2 - 2.0 * u * s1)
            b4 = tl.maximum(s4 - u * (4.0 * s3 - u * (6.0 * s2 - 3.0 * u * s1)), 0.0)
            n, mean, m2, m3, m4 = _merge_moments(n, mean, m2, m3, m4, count, mean + u, b2, b3, b4)
        else:
            n += count
            mean += s1 / tl.maximum(n, 1.0)
    # Lanes are recentred at their common mean; then moments add up.
    n, mean, m2, m3, m4 = _recentre(n, mean, m2, m3, m4)
    _store_part(
        partial_ptr, part, f, F, n, mean, m2, m3, m4,
        sum_h, sum_g, sum_hg, sum_hg2, scale_h, scale_g, TILE_F,
    )  # fmt: skip


@triton.jit
def merge_kernel(
    partial_ptr, state_ptr, F, PARTS, stride_state_r, stride_state_f,
    MOMENTS: tl.constexpr, TILE_F: tl.constexpr,
):  # fmt: skip
    # In float64 and in a fixed order, so that every run gives the same bits.
    f = tl.program_id(0).to(tl.int64) * TILE_F + tl.arange(0, TILE_F)
    inside = f < F
    zero = tl.zeros((TILE_F,), tl.float64)
    n, mean, m2, m3, m4 = zero, zero, zero, zero, zero
    h, g, hg, hg2 = zero, zero, zero, zero
    ptrs = partial_ptr + f
    for _ in range(PARTS):
        nb, mb, b2, b3, b4 = _load_moments(ptrs, F, inside)
        n, mean, m2, m3, m4 = _merge_moments(n, mean, m2, m3, m4, nb, mb, b2, b3, b4)
        h += tl.load(ptrs + 5 * F, inside, other=0.0)
        g += tl.load(ptrs + 6 * F, inside, other=0.0)
        hg += tl.load(ptrs + 7 * F, inside, other=0.0)
        hg2 += tl.load(ptrs + 8 * F, inside, other=0.0)
        ptrs += 9 * F
    out = state_ptr + f * stride_state_f
    na, ma, a2, a3, a4 = _load_moments(out, stride_state_r, inside)
    n, mean, m2, m3, m4 = _merge_moments(na, ma, a2, a3, a4, n, mean, m2, m3, m4)
    tl.store(out, n, inside)
    tl.store(out + stride_state_r, mean, inside)
    if MOMENTS:
        tl.store(out + 2 * stride_state_r, m2, inside)
        tl.store(out + 3 * stride_state_r, m3, inside)
        tl.store(out + 4 * stride_state_r, m4, inside)
    calls = h * g
    for row in tl.static_range(5):  # pyright: ignore
        value = h
        if row == 1:
            value = g
        if row == 2:
            value = hg
        if row == 3:
            value = hg2
        if row == 4:
            value = calls
        ptrs = out + (5 + row) * stride_state_r
        tl.store(ptrs, tl.load(ptrs, inside, other=0.0) + value, inside)
