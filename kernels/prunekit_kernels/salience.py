"""Salience: one pass over activations and gradients gives all that outlier-aware scores need.

Per column, over the tokens that count: their number, the mean and the central moments
Mₖ = Σ (h − mean)ᵏ of k = 2, 3, 4; Σ|h|, Σ|g|, Σ|h g|, Σ(h g)²; and Σ|h| · Σ|g| of each call, summed
over calls. Moments are taken around a nearby mean and merged by Pébay's formulas, so that a large
mean costs no digits (raw powers lose all of them); the state is float64. Fourth powers of float32
overflow above 1e9 and vanish below 1e-9: so powers are those of numbers divided by a power of two
near the largest, which loses nothing. Any finite h and g will do whose magnitudes, within one tile
of 1024 tokens × 256 columns, are within 2²⁸ of each other; what is smaller than that may vanish.

Source: Pébay, Sandia report SAND2008-6212, eq. 1.1 to 3.1; Zhao et al., APT, eq. 5,
arXiv:2401.12200.
Shapes: T tokens, F columns, P parts of the tokens.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit_kernels._triton import runs_triton, tl, triton

NAMES = ("count", "mean", "m2", "m3", "m4", "h", "g", "hg", "hg2", "calls")
"""What the rows of a state are; ``calls`` is Σ over calls of Σ|h| · Σ|g|."""

CHUNK = 1 << 17  # activations taken together on the CPU, whose caches then hold them
TILE_T, TILE_F = 4, 256  # fixed, as they set the order of summation
STRIDE = 16  # tiles summed around one mean before they are merged
PART = 1024  # tokens of one program


def new_state(columns: int, device: torch.device | str = "cpu") -> Float[Tensor, "10 F"]:
    """Return the state of no tokens, float64."""
    return torch.zeros(len(NAMES), columns, dtype=torch.float64, device=device)


def salience(
    h: Float[Tensor, "T F"],
    g: Float[Tensor, "T F"] | None,
    state: Float[Tensor, "10 F"],
    valid: Bool[Tensor, " T"] | None = None,
) -> None:
    """Add the tokens of one call to ``state``, in place.

    Args:
        h: Activations; float32, float16 or bfloat16 (others are cast to float32), any strides.
        g: Gradients of the same shape, of any such type; None leaves their sums as they are.
        state: From :func:`new_state`.
        valid: False for tokens that are padding.

    Raises:
        ValueError: Shapes, types or devices do not fit.
    """
    size = (len(NAMES), h.shape[1])
    if state.shape != size or state.dtype != torch.float64 or state.device != h.device:
        raise ValueError(
            f"state must be float64 of shape {size} on {h.device}, "
            f"got {state.dtype} of shape {tuple(state.shape)} on {state.device}"
        )
    if g is not None and (g.shape != h.shape or g.device != h.device):
        raise ValueError(
            f"g must be of shape {tuple(h.shape)} on {h.device}, got {tuple(g.shape)} on {g.device}"
        )
    if valid is not None and (
        valid.shape != h.shape[:1] or valid.dtype != torch.bool or valid.device != h.device
    ):
        raise ValueError(
            f"valid must be bool of shape {tuple(h.shape[:1])} on {h.device}, "
            f"got {valid.dtype} of shape {tuple(valid.shape)} on {valid.device}"
        )
    _salience(h, g, state, valid)


def merge(state: Float[Tensor, "10 F"], other: Float[Tensor, "10 F"]) -> None:
    """Add what another state saw, of other tokens or on another rank, in place.

    Ranks merge in a fixed order: the sums are not associative to the last bit.
    """
    state[:5] = torch.stack(_pebay(*state[:5], *other[:5]))
    state[5:] += other[5:]


def salience_reference(
    h: Float[Tensor, "T F"],
    g: Float[Tensor, "T F"] | None = None,
    valid: Bool[Tensor, " T"] | None = None,
) -> Float[Tensor, "10 F"]:
    """Return the state after one call, in two passes; in float64 where h is."""
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    g = torch.zeros_like(h) if g is None else g.to(h.dtype)
    if valid is not None:
        h, g = h[valid], g[valid]
    mean = h.sum(0) / max(len(h), 1)
    powers = [((h - mean) ** power).sum(0) for power in (2, 3, 4)]
    a, b = h.abs().sum(0), g.abs().sum(0)
    product = h * g
    sums = [a, b, product.abs().sum(0), product.square().sum(0), a * b]
    return torch.stack([torch.full_like(mean, len(h)), mean, *powers, *sums]).double()


def _pebay(na, ma, a2, a3, a4, nb, mb, b2, b3, b4):
    n = na + nb
    inverse = torch.where(n > 0, 1 / n.clamp_min(1), 0)
    d = mb - ma
    dn = d * inverse
    both = na * nb
    return (
        n,
        ma + nb * dn,
        a2 + b2 + d * dn * both,
        a3 + b3 + d * dn**2 * both * (na - nb) + 3 * dn * (na * b2 - nb * a2),
        a4 + b4 + d * dn**3 * both * (na**2 - both + nb**2)
        + 6 * dn**2 * (na**2 * b2 + nb**2 * a2) + 4 * dn * (na * b3 - nb * a3),
    )  # fmt: skip


@torch.library.custom_op("prunekit::salience", mutates_args=("state",))
def _salience(h: Tensor, g: Tensor | None, state: Tensor, valid: Tensor | None) -> None:
    if runs_triton(h):
        _launch(h, g, state, valid)
        return
    if valid is not None:
        h, g = h[valid], None if g is None else g[valid]
    found, step = new_state(h.shape[1]), max(1, CHUNK // max(h.shape[1], 1))
    for start in range(0, len(h), step):
        rows = slice(start, start + step)
        merge(found, _chunk(h[rows].float(), None if g is None else g[rows].float()))
    found[9] = found[5] * found[6]
    merge(state, found)


@_salience.register_fake
def _(h: Tensor, g: Tensor | None, state: Tensor, valid: Tensor | None) -> None:
    pass


def _chunk(h: Tensor, g: Tensor | None) -> Tensor:
    """Return the state of a few rows; ``calls`` is left 0."""
    found = new_state(h.shape[1], h.device)
    h, unit = _unit(h)
    count, shift = len(h), h.mean(0)
    # The mean is rounded, so the first power of what is left of it is not quite 0.
    d = h - shift
    square = d * d
    s1, s2 = d.sum(0).double(), square.sum(0).double()
    s3, s4 = torch.linalg.vecdot(square, d, dim=0).double(), square.square().sum(0).double()
    u = s1 / count
    found[0], found[1], found[2] = count, (shift.double() + u) * unit, (s2 - u * s1) * unit**2
    found[3] = (s3 - u * (3 * s2 - 2 * u * s1)) * unit**3
    found[4] = (s4 - u * (4 * s3 - u * (6 * s2 - 3 * u * s1))) * unit**4
    found[5] = h.abs().sum(0).double() * unit
    if g is not None:
        g, other = _unit(g)
        product = d.copy_(h).mul_(g)
        found[6] = g.abs().sum(0).double() * other
        found[7] = product.abs().sum(0).double() * (unit * other)
        found[8] = product.square_().sum(0).double() * (unit * other) ** 2
    return found


def _unit(x: Tensor) -> tuple[Tensor, float]:
    """Return x divided by a power of two near its largest magnitude, and that power."""
    if not x.numel():
        return x, 1.0
    low, high = x.aminmax()
    largest = max(-float(low), float(high))
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    exponent = max(-126, min(126, exponent))
    # So near 1 there is nothing to gain.
    return (x, 1.0) if abs(exponent) < 8 else (x * 2.0**-exponent, 2.0**exponent)


def _launch(h: Tensor, g: Tensor | None, state: Tensor, valid: Tensor | None) -> None:
    h, g = _narrow(h), None if g is None else _narrow(g)
    tokens, columns = h.shape
    if not h.numel():
        return
    parts = triton.cdiv(tokens, PART)
    partial = torch.empty((parts, 9, columns), dtype=torch.float64, device=h.device)
    other = h if g is None else g
    with torch.cuda.device_of(h):
        _part_kernel[(triton.cdiv(columns, TILE_F), parts)](
            h, other, h if valid is None else valid, partial, tokens, columns,
            *h.stride(), *other.stride(), 0 if valid is None else valid.stride(0),
            GRADIENTS=g is not None, PADDED=valid is not None, PART=PART, STRIDE=STRIDE,
            TILE_T=TILE_T, TILE_F=TILE_F, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        _merge_kernel[(triton.cdiv(columns, 128),)](
            partial, state, columns, parts, *state.stride(),
            TILE_F=128, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def _narrow(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x.float()


@triton.jit
def _merged(na, ma, a2, a3, a4, nb, mb, b2, b3, b4):
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
    """Return 2⁻ᵏ for the power of two 2ᵏ ≤ top, and 0 for 0."""
    bits = top.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
    inverse = (2130706432 - bits).to(tl.float32, bitcast=True)
    return tl.where(top > 0, inverse, 0.0)


@triton.jit
def _part_kernel(  # noqa: C901, PLR0915  nine sums at once
    h_ptr, g_ptr, valid_ptr, partial_ptr, T, F, h_t, h_f, g_t, g_f, valid_t,
    GRADIENTS: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr, STRIDE: tl.constexpr,
    TILE_T: tl.constexpr, TILE_F: tl.constexpr,
):  # fmt: skip
    # Every lane [TILE_T, TILE_F] sums powers around the mean it has so far, then merges.
    f = tl.program_id(0).to(tl.int64) * TILE_F + tl.arange(0, TILE_F)[None, :]
    part = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, TILE_T)[:, None]
    zero = tl.zeros((TILE_T, TILE_F), tl.float32)
    n = tl.zeros((TILE_T, 1), tl.float32)
    mean = zero
    m2 = zero
    m3 = zero
    m4 = zero
    sum_h = zero
    sum_g = zero
    sum_hg = zero
    sum_hg2 = zero
    scale_h = tl.cast(0.0, tl.float32)
    scale_g = tl.cast(0.0, tl.float32)
    tokens = tl.minimum(T - part * PART, PART).to(tl.int32)
    for start in tl.range(0, tokens, STRIDE * TILE_T):  # pyright: ignore
        s1 = zero
        s2 = zero
        s3 = zero
        s4 = zero
        count = tl.zeros((TILE_T, 1), tl.float32)
        if (tl.min(tl.min(n, 1), 0) == 0) | (scale_h == 0) | (GRADIENTS and scale_g == 0):
            # A lane's first tokens that count are read twice, since it has no mean to begin with;
            # and a program's first that are not 0, by which it scales.
            first = zero
            top_h = zero
            top_g = zero
            for step in tl.range(0, STRIDE):  # pyright: ignore
                t = part * PART + start + step * TILE_T + lane
                ok = t < T
                if PADDED:
                    ok = ok & (tl.load(valid_ptr + t * valid_t, ok, other=0) != 0)
                inside = ok & (f < F)
                h = tl.load(h_ptr + t * h_t + f * h_f, inside, other=0.0).to(tl.float32)
                top_h = tl.maximum(top_h, tl.abs(h))
                first += h * (1.0 / STRIDE)
                count += ok.to(tl.float32)
                if GRADIENTS:
                    g = tl.load(g_ptr + t * g_t + f * g_f, inside, other=0.0).to(tl.float32)
                    top_g = tl.maximum(top_g, tl.abs(g))
            scale_h = tl.where(scale_h > 0, scale_h, _inverse(tl.max(tl.max(top_h, 1), 0)))
            scale_g = tl.where(scale_g > 0, scale_g, _inverse(tl.max(tl.max(top_g, 1), 0)))
            first = first * scale_h * (STRIDE / tl.maximum(count, 1.0))
            mean = tl.where(n > 0, mean, first)
            count = tl.zeros((TILE_T, 1), tl.float32)
        for step in tl.range(0, STRIDE, num_stages=4):  # pyright: ignore
            t = part * PART + start + step * TILE_T + lane
            ok = t < T
            if PADDED:
                ok = ok & (tl.load(valid_ptr + t * valid_t, ok, other=0) != 0)
            inside = ok & (f < F)
            h = tl.load(h_ptr + t * h_t + f * h_f, inside, other=0.0).to(tl.float32) * scale_h
            d = tl.where(inside, h - mean, 0.0)
            d2 = d * d
            s1 += d
            s2 += d2
            s3 += d2 * d
            s4 += d2 * d2
            count += ok.to(tl.float32)
            sum_h += tl.abs(h)
            if GRADIENTS:
                g = tl.load(g_ptr + t * g_t + f * g_f, inside, other=0.0).to(tl.float32) * scale_g
                product = tl.abs(h * g)
                sum_g += tl.abs(g)
                sum_hg += product
                sum_hg2 += product * product
        inverse = tl.where(count > 0, 1.0 / tl.where(count > 0, count, 1.0), 0.0)
        u = s1 * inverse
        b2 = tl.maximum(s2 - u * s1, 0.0)
        b3 = s3 - u * (3.0 * s2 - 2.0 * u * s1)
        b4 = tl.maximum(s4 - u * (4.0 * s3 - u * (6.0 * s2 - 3.0 * u * s1)), 0.0)
        n, mean, m2, m3, m4 = _merged(n, mean, m2, m3, m4, count, mean + u, b2, b3, b4)
    # Lanes are recentred at their common mean; then plain sums do.
    total = tl.sum(n, 0)[None, :]
    common = tl.sum(n * mean, 0)[None, :] / tl.maximum(total, 1.0)
    # A second time, from what is left, so that a large mean is not rounded away.
    common += tl.sum(n * (mean - common), 0)[None, :] / tl.maximum(total, 1.0)
    d = tl.where(n > 0, mean - common, 0.0)
    d2 = d * d
    m4 += d * (4.0 * m3 + d * (6.0 * m2 + n * d2))
    m3 += d * (3.0 * m2 + n * d2)
    m2 += n * d2
    u = 1.0 / tl.where(scale_h > 0, scale_h, 1.0).to(tl.float64)
    v = u / tl.where(scale_g > 0, scale_g, 1.0).to(tl.float64)
    spot = partial_ptr + part * 9 * F + f
    inside = f < F
    tl.store(spot, tl.zeros((1, TILE_F), tl.float64) + total, inside)
    tl.store(spot + F, common.to(tl.float64) * u, inside)
    tl.store(spot + 2 * F, tl.sum(m2, 0)[None, :].to(tl.float64) * (u * u), inside)
    tl.store(spot + 3 * F, tl.sum(m3, 0)[None, :].to(tl.float64) * (u * u * u), inside)
    tl.store(spot + 4 * F, tl.sum(m4, 0)[None, :].to(tl.float64) * (u * u * u * u), inside)
    tl.store(spot + 5 * F, tl.sum(sum_h, 0)[None, :].to(tl.float64) * u, inside)
    tl.store(spot + 6 * F, tl.sum(sum_g, 0)[None, :].to(tl.float64) * (v / u), inside)
    tl.store(spot + 7 * F, tl.sum(sum_hg, 0)[None, :].to(tl.float64) * v, inside)
    tl.store(spot + 8 * F, tl.sum(sum_hg2, 0)[None, :].to(tl.float64) * (v * v), inside)


@triton.jit
def _merge_kernel(  # noqa: PLR0915  nine sums at once
    partial_ptr, state_ptr, F, parts, state_r, state_f, TILE_F: tl.constexpr,
):  # fmt: skip
    # In float64 and in a fixed order, so that each run gives the same bits.
    f = tl.program_id(0).to(tl.int64) * TILE_F + tl.arange(0, TILE_F)
    inside = f < F
    zero = tl.zeros((TILE_F,), tl.float64)
    n = zero
    mean = zero
    m2 = zero
    m3 = zero
    m4 = zero
    h = zero
    g = zero
    hg = zero
    hg2 = zero
    spot = partial_ptr + f
    for _ in range(parts):
        nb = tl.load(spot, inside, other=0.0)
        mb = tl.load(spot + F, inside, other=0.0)
        b2 = tl.load(spot + 2 * F, inside, other=0.0)
        b3 = tl.load(spot + 3 * F, inside, other=0.0)
        b4 = tl.load(spot + 4 * F, inside, other=0.0)
        n, mean, m2, m3, m4 = _merged(n, mean, m2, m3, m4, nb, mb, b2, b3, b4)
        h += tl.load(spot + 5 * F, inside, other=0.0)
        g += tl.load(spot + 6 * F, inside, other=0.0)
        hg += tl.load(spot + 7 * F, inside, other=0.0)
        hg2 += tl.load(spot + 8 * F, inside, other=0.0)
        spot += 9 * F
    out = state_ptr + f * state_f
    na = tl.load(out, inside, other=0.0)
    ma = tl.load(out + state_r, inside, other=0.0)
    a2 = tl.load(out + 2 * state_r, inside, other=0.0)
    a3 = tl.load(out + 3 * state_r, inside, other=0.0)
    a4 = tl.load(out + 4 * state_r, inside, other=0.0)
    n, mean, m2, m3, m4 = _merged(na, ma, a2, a3, a4, n, mean, m2, m3, m4)
    tl.store(out, n, inside)
    tl.store(out + state_r, mean, inside)
    tl.store(out + 2 * state_r, m2, inside)
    tl.store(out + 3 * state_r, m3, inside)
    tl.store(out + 4 * state_r, m4, inside)
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
        spot = out + (5 + row) * state_r
        tl.store(spot, tl.load(spot, inside, other=0.0) + value, inside)
