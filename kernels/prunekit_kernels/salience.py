"""Salience: sums over activations and gradients for outlier-aware scores.

One pass gives, per column and over the valid tokens: their number, the mean and the central moments
Mₖ = Σ (h − mean)ᵏ of k = 2, 3, 4; Σ|h|, Σ|g|, Σ|h g|, Σ(h g)²; and Σ|h| · Σ|g| of each call, summed
over calls.

Moments are taken around a nearby mean and merged by Pébay's formulas, so that a large mean costs no
digits (raw powers would lose all of them); the state is float64. Fourth powers of float32 overflow
above 1e9 and vanish below 1e-9, so powers are of numbers divided by a power of two near the
largest, which is exact. Finite h and g are supported whose magnitudes within one tile of 1024
tokens × 256 columns are within 2²⁸ of each other; smaller ones may vanish.

Source: Pébay, Sandia report SAND2008-6212, eq. 1.1 to 3.1; Zhao et al., APT, eq. 5,
arXiv:2401.12200.
Shapes: T tokens, F columns, P parts of the tokens.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit_kernels._salience_kernels import merge_kernel, part_kernel
from prunekit_kernels._triton import runs_triton, triton

NAMES = ("count", "mean", "m2", "m3", "m4", "h", "g", "hg", "hg2", "calls")
"""Rows of a state; ``calls`` is Σ over calls of Σ|h| · Σ|g|."""

CHUNK = 1 << 17  # activations processed together on the CPU, to fit its caches
TILE_T, TILE_F = 4, 256  # fixed: they set the summation order
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
    *,
    moments: bool = True,
    products: bool = True,
) -> None:
    """Add the tokens of one call to ``state``, in place.

    What is left out takes no time: on a GPU the sums that remain cost fewer instructions than
    reading ``h`` and ``g`` takes.

    Args:
        h: Activations; float32, float16 or bfloat16 (others are cast to float32), any strides.
        g: Gradients of the same shape, of any such dtype; None leaves their sums unchanged.
        state: From :func:`new_state`.
        valid: False for tokens that are padding.
        moments: False leaves M₂ to M₄ unchanged.
        products: False leaves Σ|h g| and Σ(h g)² unchanged.

    Raises:
        ValueError: Shapes, types or devices do not match.
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
    _salience(h, g, state, valid, moments, products)


def merge(state: Float[Tensor, "10 F"], other: Float[Tensor, "10 F"]) -> None:
    """Add the state of other tokens or of another rank, in place.

    Ranks merge in a fixed order: the sums are not associative to the last bit.
    """
    state[:5] = torch.stack(merge_moments(*state[:5], *other[:5]))
    state[5:] += other[5:]


def salience_reference(
    h: Float[Tensor, "T F"],
    g: Float[Tensor, "T F"] | None = None,
    valid: Bool[Tensor, " T"] | None = None,
) -> Float[Tensor, "10 F"]:
    """Return the state after one call, in two passes.

    Args:
        h: Activations; float64 is computed in float64, other types in float32.
        g: Gradients, or None.
        valid: False for tokens that are padding.
    """
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


def merge_moments(na, ma, a2, a3, a4, nb, mb, b2, b3, b4):
    """Merge counts, means and central moments by Pébay's formulas."""
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
def _salience(
    h: Tensor,
    g: Tensor | None,
    state: Tensor,
    valid: Tensor | None,
    moments: bool,  # noqa: FBT001  an operator takes no keywords
    products: bool,  # noqa: FBT001
) -> None:
    if runs_triton(h):
        _launch(h, g, state, valid, moments=moments, products=products)
        return
    if valid is not None:
        h, g = h[valid], None if g is None else g[valid]
    found, step = new_state(h.shape[1]), max(1, CHUNK // max(h.shape[1], 1))
    for start in range(0, len(h), step):
        rows = slice(start, start + step)
        part = None if g is None else g[rows].float()
        merge(found, _chunk(h[rows].float(), part, moments=moments, products=products))
    found[9] = found[5] * found[6]
    before = state[2:5].clone()
    merge(state, found)
    if not moments:
        state[2:5] = before


@_salience.register_fake
def _(
    h: Tensor,
    g: Tensor | None,
    state: Tensor,
    valid: Tensor | None,
    moments: bool,  # noqa: FBT001
    products: bool,  # noqa: FBT001
) -> None:
    pass


def _chunk(h: Tensor, g: Tensor | None, *, moments: bool, products: bool) -> Tensor:
    """Return the state of a few rows; ``calls`` is left at 0."""
    state = new_state(h.shape[1], h.device)
    h, unit = _unit(h)
    state[5] = h.abs().sum(0).double() * unit
    if moments:
        state[:5] = _moments(h, unit)
    else:
        state[0], state[1] = len(h), h.mean(0).double() * unit
    if g is not None:
        g, other = _unit(g)
        state[6] = g.abs().sum(0).double() * other
        if products:
            product = h * g
            state[7] = product.abs().sum(0).double() * (unit * other)
            state[8] = product.square_().sum(0).double() * (unit * other) ** 2
    return state


def _moments(h: Tensor, unit: float) -> Tensor:
    """Return count, mean and central moments of a few rows times ``unit``, [5, F]."""
    state = new_state(h.shape[1], h.device)[:5]
    count, shift = len(h), h.mean(0)
    # The mean is rounded, so the first power of the remainder is not quite 0.
    d = h - shift
    square = d * d
    s1, s2 = d.sum(0).double(), square.sum(0).double()
    s3, s4 = torch.linalg.vecdot(square, d, dim=0).double(), square.square().sum(0).double()
    u = s1 / count
    state[0], state[1], state[2] = count, (shift.double() + u) * unit, (s2 - u * s1) * unit**2
    state[3] = (s3 - u * (3 * s2 - 2 * u * s1)) * unit**3
    state[4] = (s4 - u * (4 * s3 - u * (6 * s2 - 3 * u * s1))) * unit**4
    return state


def _unit(x: Tensor) -> tuple[Tensor, float]:
    """Return x / 2ᵏ and 2ᵏ, near the largest magnitude of x."""
    if not x.numel():
        return x, 1.0
    low, high = x.aminmax()
    largest = max(-float(low), float(high))
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    exponent = max(-126, min(126, exponent))
    # Near 1 scaling gains nothing.
    return (x, 1.0) if abs(exponent) < 8 else (x * 2.0**-exponent, 2.0**exponent)


def _launch(
    h: Tensor,
    g: Tensor | None,
    state: Tensor,
    valid: Tensor | None,
    *,
    moments: bool = True,
    products: bool = True,
) -> None:
    h, g = _narrow(h), None if g is None else _narrow(g)
    tokens, columns = h.shape
    if not h.numel():
        return
    parts = triton.cdiv(tokens, PART)
    partial = torch.empty((parts, 9, columns), dtype=torch.float64, device=h.device)
    other = h if g is None else g
    with torch.cuda.device_of(h):
        part_kernel[(triton.cdiv(columns, TILE_F), parts)](
            h, other, h if valid is None else valid, partial, tokens, columns,
            *h.stride(), *other.stride(), 0 if valid is None else valid.stride(0),
            GRADIENTS=g is not None, PADDED=valid is not None,
            MOMENTS=moments, PRODUCTS=products and g is not None, PART=PART, STRIDE=STRIDE,
            TILE_T=TILE_T, TILE_F=TILE_F, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        merge_kernel[(triton.cdiv(columns, 128),)](
            partial, state, columns, parts, *state.stride(),
            MOMENTS=moments, TILE_F=128, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def _narrow(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x.float()
