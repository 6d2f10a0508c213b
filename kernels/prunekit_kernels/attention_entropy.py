"""Attention entropy: entropy of each head's attention, from q and k.

    H = −Σⱼ pⱼ log pⱼ,  p = softmax(s),  s = cap · tanh(q·k scale / cap) + bias

No score matrix is stored. With x = s − max s ≤ 0, l = Σ eˣ and u = Σ eˣ x this is H = ln l − u / l:
both terms are at least 0, so nothing cancels. A further block of keys, whose maximum exceeds the
old one by d, is merged by

    u ← e⁻ᵈ (u − d l) + u′,  l ← e⁻ᵈ l + l′

Per head, over the rows that see a key: Σ H, Σ log n, where n is the number of visible keys (log n
is the highest possible H), and the number of rows. All are sums, so they add up over batches and
ranks.

Source: the online softmax of Milakov & Gimelshein, arXiv:1805.02867.
Shapes: B sequences, H heads, G key heads (G divides H), S queries, T keys, D head dimension.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit_kernels._attention_entropy_kernel import kernel
from prunekit_kernels._precision import full_precision
from prunekit_kernels._triton import (
    architecture,
    runs_ptx,
    runs_triton,
    triton,
    version,
)
from prunekit_kernels.probability_entropy import (
    Entropy,
    check_mask,
    check_valid,
    probability_entropy_reference,
)

CHUNK = 1 << 18  # scores held at a time on the CPU; rows are not split
LOG2E = math.log2(math.e)


def attention_entropy(
    q: Float[Tensor, "B H S D"],
    k: Float[Tensor, "B G T D"],
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    mask: Bool[Tensor, "#B #H #S #T"] | None = None,
    bias: Float[Tensor, "#B #H #S #T"] | None = None,
    valid: Bool[Tensor, "B S"] | None = None,
) -> Entropy:
    """Return attention entropies, summed per head.

    Args:
        q: Queries after rotary embedding; float32, float16 or bfloat16 (float64 in PyTorch only),
            any strides.
        k: Keys, of the same dtype.
        scale: None for D⁻½.
        causal: Query i sees keys up to i + T − S: the last query is aligned with the last key.
        window: A query sees keys less than this far away, back and, unless ``causal``, ahead.
        soft_cap: Scores are squeezed between ± this.
        mask: True where the query sees the key; broadcast, so padding is [B, 1, 1, T].
        bias: Added to the scores, such as T5's position bias or an additive mask. −inf and the
            lowest finite number of its dtype hide the key.
        valid: False for queries that are padding.

    Raises:
        ValueError: Shapes, types or devices do not match, or a setting is out of range.
    """
    shape = _check(q, k, window, soft_cap)
    for name, part in (("mask", mask), ("bias", bias)):
        if part is not None:
            check_mask(name, part, shape, q)
    if valid is not None:
        check_valid(valid, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cap = soft_cap or 0.0
    return Entropy(*_attention_entropy(q, k, mask, bias, valid, scale, causal, window or 0, cap))


def attention_entropy_reference(
    q: Float[Tensor, "B H S D"],
    k: Float[Tensor, "B G T D"],
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
) -> Entropy:
    """Return the same from the whole score matrix.

    Args:
        q: As in :func:`attention_entropy`; computed in its precision, at least float32.
        k: As there, like the other arguments.
        scale: None for D⁻½.
        causal: Keys after the query are hidden.
        window: Distance from which keys are hidden.
        soft_cap: Bound of the scores.
        mask: True where the query sees the key.
        bias: Added to the scores.
        valid: False for queries that are padding.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    with full_precision():
        score = q.to(wide) @ k.to(wide).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap:
        score = soft_cap * torch.tanh(score / soft_cap)
    rows, keys = score.shape[2:]
    seen = _reach(torch.arange(rows, device=q.device), keys, keys - rows, causal, window or 0)
    seen = seen.expand(score.shape)
    if bias is not None:
        score, seen = score + bias.to(wide), seen & _visible(bias)
    if mask is not None:
        seen = seen & mask
    share = score.masked_fill(~seen, -math.inf).softmax(-1)
    return probability_entropy_reference(share.where(seen, 0), seen, valid)


def _visible(bias: Tensor) -> Tensor:
    return bias > torch.finfo(bias.dtype).min


def _reach(row: Tensor, keys: int, offset: int, causal: bool, window: int) -> Tensor:  # noqa: FBT001
    """Return which keys [S, T] the rows reach, by position alone."""
    ahead = torch.arange(keys, device=row.device) - row[:, None] - offset
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window:
        seen &= ahead > -window
        if not causal:
            seen &= ahead < window
    return seen


def _check(q: Tensor, k: Tensor, window: int | None, soft_cap: float | None) -> tuple[int, ...]:
    shapes = f"q of shape {tuple(q.shape)} and k of shape {tuple(k.shape)}"
    if q.ndim != 4 or k.ndim != 4 or q.shape[::3] != k.shape[::3] or not k.shape[1]:
        raise ValueError(f"{shapes}: they must be [B, H, S, D] and [B, G, T, D]")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: the heads of k must divide those of q")
    if q.dtype != k.dtype or q.device != k.device or not q.is_floating_point():
        raise ValueError(
            f"q and k must be of one float type on one device, got {q.dtype} on {q.device} and "
            f"{k.dtype} on {k.device}"
        )
    if (window is not None and window < 1) or (soft_cap is not None and not soft_cap > 0):
        raise ValueError(f"window and soft_cap must be positive, got {window} and {soft_cap}")
    return (*q.shape[:3], k.shape[2])


@torch.library.custom_op("prunekit::attention_entropy", mutates_args=())
def _attention_entropy(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    scale: float,
    causal: bool,  # noqa: FBT001
    window: int,
    cap: float,
) -> Tensor:
    if runs_triton(q) and q.dtype != torch.float64:
        return _launch(q, k, mask, bias, valid, scale, causal, window, cap)
    with full_precision():
        return _chunks(q, k, mask, bias, valid, scale, causal, window, cap)


@_attention_entropy.register_fake
def _(q, k, mask, bias, valid, scale, causal, window, cap) -> Tensor:  # noqa: ARG001
    return q.new_empty((3, q.shape[1]), dtype=torch.float64)


def _chunks(q, k, mask, bias, valid, scale, causal, window, cap) -> Tensor:
    """Return the sums, from chunks of rows and the keys they reach.

    A chunk holds some rows of all heads that share one key head.
    """
    batch, heads, rows, _ = q.shape
    keys, wide = k.shape[2], torch.promote_types(q.dtype, torch.float32)
    together = heads // k.shape[1]
    total = torch.zeros(3, heads, dtype=torch.float64, device=q.device)
    step = max(1, CHUNK // max(1, together * keys))
    offset = keys - rows
    for b in range(batch):
        for g in range(k.shape[1]):
            part = slice(g * together, (g + 1) * together)
            every = k[b, g].to(wide)
            for start in range(0, rows, step):
                end = min(start + step, rows)
                last = max(0, min(keys, end + offset)) if causal else keys
                first = max(0, min(last, start + offset - window + 1)) if window else 0
                score = torch.matmul(q[b, part, start:end].to(wide) * scale, every[first:last].T)
                if cap:
                    score = score.div_(cap).tanh_().mul_(cap)
                row = torch.arange(start, end, device=q.device)
                seen = _reach(row, last - first, offset - first, causal, window)
                window_of = b, part, slice(start, end), slice(first, last)
                if bias is not None:
                    local = _cut(bias, window_of)
                    score, seen = score.add_(local), seen & _visible(local)
                if mask is not None:
                    seen = seen & _cut(mask, window_of)
                ok = None if valid is None else valid[b, start:end]
                total[:, part] += _rows(score.masked_fill_(~seen, -math.inf), seen, ok)
    return total


def _cut(part: Tensor, window: tuple) -> Tensor:
    b, *rest = window
    of = [slice(None) if size == 1 else cut for size, cut in zip(part.shape[1:], rest, strict=True)]
    return part[0 if part.shape[0] == 1 else b][tuple(of)]


def _rows(score: Tensor, seen: Tensor, valid: Tensor | None) -> Tensor:
    """Return the three sums [3, heads] of scores [heads, rows, keys].

    Hidden scores are −inf.
    """
    n = seen.sum(-1).expand(score.shape[:-1])
    ok = n > 0 if valid is None else (n > 0) & valid
    if not score.shape[-1]:
        return score.new_zeros((3, score.shape[0]), dtype=torch.float64)
    x = score.sub_(score.amax(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).min))
    e = x.exp()
    l = e.sum(-1).clamp_min(1e-30)  # noqa: E741
    # Where e is 0, x may be anything finite.
    u = torch.linalg.vecdot(e, x.clamp_min_(-1e5))
    entropy = (l.log() - u / l).where(ok, 0)
    log_keys = n.clamp_min(1).to(score.dtype).log().where(ok, 0)
    return torch.stack([part.double().sum(-1) for part in (entropy, log_keys, ok)])


def _cap(*, biased: bool) -> dict[str, int]:
    """Return the option by which two programs fit a multiprocessor.

    Only where nothing spills: on Ampere to Hopper, by the assembler of Triton 3.9; that of 3.6
    would spill 136 bytes.
    """
    fits = runs_ptx() and not biased and architecture() <= 90 and version() >= (3, 9)
    return {"maxnreg": 128} if fits else {}


def _launch(q, k, mask, bias, valid, scale, causal, window, cap) -> Tensor:
    batch, heads, rows, size = q.shape
    keys, small = k.shape[2], q.dtype != torch.float32 and q.shape[3] <= 128
    tile_s, tile_t = (128, 64) if small else (64, 32)
    tile_d = max(16, triton.next_power_of_2(size))
    # The three TF32 products of each float32 product leave registers for few dimensions at a time.
    part_d = tile_d
    if q.dtype == torch.float32:
        part_d = 32 if tile_d > 128 else min(tile_d, 64)
    blocks = triton.cdiv(rows, tile_s)
    partial = torch.empty((3, batch, heads, blocks), dtype=torch.float32, device=q.device)
    whole = (batch, heads, rows, keys)
    mask, bias = (part if part is None else part.expand(whole) for part in (mask, bias))
    none = (0, 0, 0, 0)
    if not partial.numel():
        return partial.double().sum((1, 3))
    with torch.cuda.device_of(q):
        kernel[(blocks, heads, batch)](
            q, k, q if mask is None else mask, q if bias is None else bias,
            q if valid is None else valid, partial, rows, keys, heads // k.shape[1],
            *q.stride(), *k.stride(), *(none if mask is None else mask.stride()),
            *(none if bias is None else bias.stride()),
            *((0, 0) if valid is None else valid.stride()),
            scale if cap else scale * LOG2E, cap,
            0 if bias is None else torch.finfo(bias.dtype).min,
            CAUSAL=causal, WINDOW=window, CAPPED=cap > 0, MASKED=mask is not None,
            BIASED=bias is not None, PADDED=valid is not None, D=size,
            TILE_D=tile_d, PART_D=part_d, TILE_S=tile_s, TILE_T=tile_t,
            PRECISION="ieee" if torch.version.hip or q.dtype != torch.float32 else "tf32x3",
            num_warps=8 if small else 4, num_stages=2, enable_fp_fusion=True,
            **_cap(biased=bias is not None) if small else {},
        )  # fmt: skip
    return partial.double().sum((1, 3))
