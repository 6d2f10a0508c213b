"""Probability entropy: attention entropy per head, from given probabilities.

    H = ln Z − (Σⱼ pⱼ ln pⱼ) / Z,  Z = Σⱼ pⱼ

The division by Z corrects rows that bfloat16 rounding keeps from summing to 1; 0 ln 0 is 0. From q
and k, :mod:`prunekit_kernels.attention_entropy` needs no probabilities.
Shapes: B sequences, H heads, S queries, T keys.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit_kernels._triton import runs_triton, tl, triton

CHUNK = 1 << 18  # probabilities processed together on the CPU
TILE_S, TILE_T = 8, 256


class Entropy(NamedTuple):
    """Sums over valid rows, float64 [H].

    Attributes:
        entropy: Σ H, in nats.
        log_keys: Σ ln n, the highest possible entropy, where n is the number of visible keys of a
            row.
        rows: Number of rows that see a key.
    """

    entropy: Float[Tensor, " H"]
    log_keys: Float[Tensor, " H"]
    rows: Float[Tensor, " H"]


def probability_entropy(
    p: Float[Tensor, "B H S T"],
    mask: Bool[Tensor, "#B #H #S #T"] | None = None,
    valid: Bool[Tensor, "B S"] | None = None,
) -> Entropy:
    """Return attention entropies, summed per head.

    Args:
        p: Probabilities, of any float type and strides; summed in float32.
        mask: True where the query may see the key. None: where p > 0.
        valid: False for queries that are padding.

    Raises:
        ValueError: Shapes, types or devices do not match.
    """
    if p.ndim != 4 or not p.is_floating_point():
        raise ValueError(f"p must be [B, H, S, T] of a float type, got {p.dtype} {tuple(p.shape)}")
    if mask is not None:
        check_mask("mask", mask, p.shape, p)
    if valid is not None:
        check_valid(valid, p)
    return Entropy(*_probability_entropy(p, mask, valid))


def probability_entropy_reference(
    p: Float[Tensor, "B H S T"],
    mask: Bool[Tensor, "#B #H #S #T"] | None = None,
    valid: Bool[Tensor, "B S"] | None = None,
) -> Entropy:
    """Return the same at once for the whole tensor.

    Computed in float64 where ``p`` is float64.

    Args:
        p: As in :func:`probability_entropy`.
        mask: As there.
        valid: As there.
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    seen = p > 0 if mask is None else mask.expand(p.shape)
    p = p.to(wide).where(seen, 0)
    n, total = seen.sum(-1), p.sum(-1)
    safe = total.where(total > 0, 1)
    ok = n > 0 if valid is None else (n > 0) & valid[:, None]
    entropy = (safe.log() + torch.special.entr(p).sum(-1) / safe).where(ok, 0)
    log_keys = n.clamp_min(1).to(wide).log().where(ok, 0)
    return Entropy(*(part.sum((0, 2), dtype=torch.float64) for part in (entropy, log_keys, ok)))


def check_mask(name: str, mask: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """Check that a mask or bias broadcasts to the scores.

    Args:
        name: "mask", which must be bool, or the name of a bias, which must be a float type.
        mask: The tensor.
        shape: Shape of the scores [B, H, S, T].
        q: A tensor on the required device.

    Raises:
        ValueError: The dtype, shape or device does not match.
    """
    fits = mask.ndim == 4 and all(a in (1, b) for a, b in zip(mask.shape, shape, strict=True))
    typed = mask.dtype == torch.bool if name == "mask" else mask.is_floating_point()
    if not typed or not fits or mask.device != q.device:
        raise ValueError(
            f"{name} must be {'bool' if name == 'mask' else 'of a float type'}, broadcast to "
            f"{tuple(shape)}, on {q.device}, got {mask.dtype} of shape {tuple(mask.shape)} on "
            f"{mask.device}"
        )


def check_valid(valid: Tensor, q: Tensor) -> None:
    """Check that ``valid`` is a bool per query.

    Raises:
        ValueError: The dtype, shape or device does not match.
    """
    size = (q.shape[0], q.shape[2])
    if valid.dtype != torch.bool or valid.shape != size or valid.device != q.device:
        raise ValueError(
            f"valid must be bool of shape {size} on {q.device}, "
            f"got {valid.dtype} of shape {tuple(valid.shape)} on {valid.device}"
        )


@torch.library.custom_op("prunekit::probability_entropy", mutates_args=())
def _probability_entropy(p: Tensor, mask: Tensor | None, valid: Tensor | None) -> Tensor:
    if runs_triton(p) and p.dtype != torch.float64:
        return _launch(p, mask, valid)
    total = torch.zeros(3, p.shape[1], dtype=torch.float64, device=p.device)
    step = max(1, CHUNK // max(1, p.shape[1] * p.shape[3]))
    mask = None if mask is None else mask.expand(p.shape)
    for b in range(p.shape[0]):
        for start in range(0, p.shape[2], step):
            rows = slice(b, b + 1), slice(None), slice(start, start + step)
            local = None if mask is None else mask[rows]
            ok = None if valid is None else valid[b : b + 1, start : start + step]
            total += _rows(p[rows], local, ok)
    return total


@_probability_entropy.register_fake
def _(p: Tensor, mask: Tensor | None, valid: Tensor | None) -> Tensor:  # noqa: ARG001
    return p.new_empty((3, p.shape[1]), dtype=torch.float64)


def _rows(p: Tensor, mask: Tensor | None, valid: Tensor | None) -> Tensor:
    """Return the three sums [3, H] of a few rows."""
    wide = p.to(torch.promote_types(p.dtype, torch.float32))
    if mask is not None:
        wide = wide.where(mask, 0)
    n = (wide > 0 if mask is None else mask).sum(-1, dtype=torch.int32)
    total = wide.sum(-1)
    safe = total.where(total > 0, 1)
    power = torch.linalg.vecdot(wide, wide.clamp_min(torch.finfo(wide.dtype).tiny).log_())
    ok = n > 0 if valid is None else (n > 0) & valid[:, None]
    entropy = (safe.log() - power / safe).where(ok, 0)
    log_keys = n.clamp_min(1).to(wide.dtype).log().where(ok, 0)
    return torch.stack([part.sum((0, 2), dtype=torch.float64) for part in (entropy, log_keys, ok)])


def _launch(p: Tensor, mask: Tensor | None, valid: Tensor | None) -> Tensor:
    batch, heads, rows, keys = p.shape
    blocks = triton.cdiv(rows, TILE_S)
    partial = torch.empty((3, batch, heads, blocks), dtype=torch.float32, device=p.device)
    if partial.numel():
        mask = None if mask is None else mask.expand(p.shape)
        with torch.cuda.device_of(p):
            _kernel[(blocks, heads, batch)](
                p, p if mask is None else mask, p if valid is None else valid, partial,
                rows, keys, *p.stride(), *((0, 0, 0, 0) if mask is None else mask.stride()),
                *((0, 0) if valid is None else valid.stride()),
                MASKED=mask is not None, PADDED=valid is not None,
                TILE_S=TILE_S, TILE_T=TILE_T, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return partial.double().sum((1, 3))


@triton.jit
def _kernel(
    p_ptr, mask_ptr, valid_ptr, partial_ptr, S, T,
    stride_p_b, stride_p_h, stride_p_s, stride_p_t,
    stride_mask_b, stride_mask_h, stride_mask_s, stride_mask_t, stride_valid_b, stride_valid_s,
    MASKED: tl.constexpr, PADDED: tl.constexpr, TILE_S: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    s = block.to(tl.int64) * TILE_S + tl.arange(0, TILE_S)
    p_ptrs = p_ptr + b * stride_p_b + h * stride_p_h + s[:, None] * stride_p_s
    mask_ptrs = mask_ptr + b * stride_mask_b + h * stride_mask_h + s[:, None] * stride_mask_s
    total = tl.zeros((TILE_S, TILE_T), tl.float32)
    power = tl.zeros((TILE_S, TILE_T), tl.float32)
    n = tl.zeros((TILE_S, TILE_T), tl.float32)
    lane = tl.arange(0, TILE_T).to(tl.int64)
    for start in tl.range(0, T, TILE_T, num_stages=3):  # pyright: ignore
        t = (start + lane)[None, :]
        inside = (s < S)[:, None] & (t < T)
        p = tl.load(p_ptrs + t * stride_p_t, inside, other=0.0).to(tl.float32)  # [TILE_S, TILE_T]
        if MASKED:
            seen = inside & (tl.load(mask_ptrs + t * stride_mask_t, inside, other=0) != 0)
            p = tl.where(seen, p, 0.0)
            n += seen.to(tl.float32)
        else:
            n += (p > 0).to(tl.float32)
        total += p
        power += p * tl.math.log2(tl.where(p > 0, p, 1.0))
    n = tl.sum(n, 1)
    total = tl.sum(total, 1)
    safe = tl.where(total > 0, total, 1.0)  # pyright: ignore
    ok = (s < S) & (n > 0)  # pyright: ignore
    if PADDED:
        ok = ok & (
            tl.load(valid_ptr + b * stride_valid_b + s * stride_valid_s, s < S, other=0) != 0
        )
    entropy = 0.6931471805599453 * (tl.math.log2(safe) - tl.sum(power, 1) / safe)
    log_keys = 0.6931471805599453 * tl.math.log2(tl.where(ok, n, 1.0))
    blocks = tl.num_programs(0).to(tl.int64)
    ptrs = partial_ptr + (b * tl.num_programs(1) + h) * blocks + block
    stride_part = blocks * tl.num_programs(1) * tl.num_programs(2)
    tl.store(ptrs, tl.sum(tl.where(ok, entropy, 0.0), 0))
    tl.store(ptrs + stride_part, tl.sum(tl.where(ok, log_keys, 0.0), 0))
    tl.store(ptrs + 2 * stride_part, tl.sum(ok.to(tl.float32), 0))
