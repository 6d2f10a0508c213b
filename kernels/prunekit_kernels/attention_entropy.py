"""Attention entropy: how widely each head looks, from q and k, with no score matrix in memory.

    H = −Σⱼ pⱼ log pⱼ,  p = softmax(s),  s = cap · tanh(q·k scale / cap) + bias

With x = s − max s ≤ 0, l = Σ eˣ and u = Σ eˣ x this is H = ln l − u / l: both addends are at least
0, so nothing cancels. A further block of keys, whose maximum exceeds the old one by d, is merged by

    u ← e⁻ᵈ (u − d l) + u′,  l ← e⁻ᵈ l + l′

Per head, over the rows that see a key: Σ H, Σ log n, where n is how many keys the row may see (a
row's highest H), and the number of rows. All are sums, so that they add up over batches and ranks.

Source: the online softmax of Milakov & Gimelshein, arXiv:1805.02867.
Shapes: B sequences, H heads, G key heads (G divides H), S queries, T keys, D head dimension.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit_kernels._precision import full_precision
from prunekit_kernels._triton import runs_triton, tl, triton
from prunekit_kernels.probability_entropy import (
    Entropy,
    check_mask,
    check_valid,
    probability_entropy_reference,
)

CHUNK = 1 << 18  # scores held at a time on the CPU: a row of them is never split
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
    """Return the entropies of attention, summed per head.

    Args:
        q: Queries after rotary embedding; float32, float16 or bfloat16 (float64 in PyTorch alone),
            any strides.
        k: Keys, of the same type.
        scale: None for D⁻½.
        causal: Query i sees keys up to i + T − S: the last query is aligned with the last key.
        window: A query sees keys less than this far away, back and, unless ``causal``, ahead.
        soft_cap: Scores are squeezed between ± this.
        mask: True where the query sees the key; broadcast, so padding is [B, 1, 1, T].
        bias: Added to the scores, such as T5's position bias or an additive mask. −inf and the
            lowest finite number of its type hide the key.
        valid: False for queries that are padding.

    Raises:
        ValueError: Shapes, types or devices do not fit, or a setting makes no sense.
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
    """Say the same with the whole score matrix, in the precision of ``q``, at least float32."""
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
    """Say which keys [S, T] the rows reach, by position alone."""
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
    """Take some rows of all heads of one key head at a time, and only the keys they reach."""
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
    """Return the three sums [3, heads] of scores [heads, rows, keys], −inf where not seen."""
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


def _launch(q, k, mask, bias, valid, scale, causal, window, cap) -> Tensor:
    batch, heads, rows, size = q.shape
    keys, small = k.shape[2], q.dtype != torch.float32 and q.shape[3] <= 128
    tile_s, tile_t = (128, 64) if small else (64, 32)
    tile_d = max(16, triton.next_power_of_2(size))
    # The three products that each of float32 takes leave registers for few dimensions at a time.
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
        _kernel[(blocks, heads, batch)](
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
        )  # fmt: skip
    return partial.double().sum((1, 3))


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.math.exp2(x * 2.8853900817779268))


@triton.jit
def _products(
    q, q_row, k_column, q_d, k_d, real, inside,
    D: tl.constexpr, TILE_D: tl.constexpr, PART_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return q·k; of q the first dimensions are given, and any others read again."""
    d = tl.arange(0, PART_D).to(tl.int64)
    k = tl.load(k_column + d[:, None] * k_d, (d < D)[:, None] & inside, other=0.0)
    total = tl.dot(q, k, input_precision=PRECISION)
    for _ in range(PART_D, TILE_D, PART_D):
        d += PART_D
        left = tl.load(q_row + d[None, :] * q_d, real & (d < D)[None, :], other=0.0)
        k = tl.load(k_column + d[:, None] * k_d, (d < D)[:, None] & inside, other=0.0)
        total = tl.dot(left, k, total, input_precision=PRECISION)
    return total


@triton.jit
def _merge(score, seen, top, l, u, n, GUARDED: tl.constexpr):  # noqa: E741
    """Add a block of scores, in units of log₂ e, to the running sums of its rows."""
    if GUARDED:
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    # No key yet: any finite number will do.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    x = score - base[:, None]
    e = tl.math.exp2(x)
    if GUARDED:  # 0 · −∞ is no number
        x = tl.where(e > 0, x, 0.0)
        n += tl.sum(seen.to(tl.float32), 1)
    delta = tl.where(top == float("-inf"), 0.0, top - base)
    shrink = tl.where(top == float("-inf"), 0.0, tl.math.exp2(delta))
    u = shrink * (u + delta * l) + tl.sum(e * x, 1)
    l = shrink * l + tl.sum(e, 1)  # noqa: E741
    return higher, l, u, n


@triton.jit
def _kernel(  # noqa: C901, PLR0912, PLR0915  its branches are decided when it is compiled
    q_ptr, k_ptr, mask_ptr, bias_ptr, valid_ptr, partial_ptr, S, T, SHARED,
    q_b, q_h, q_s, q_d, k_b, k_g, k_t, k_d, mask_b, mask_h, mask_s, mask_t,
    bias_b, bias_h, bias_s, bias_t, valid_b, valid_s, scale, cap, lowest,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
    BIASED: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, TILE_D: tl.constexpr,
    PART_D: tl.constexpr, TILE_S: tl.constexpr, TILE_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # For sm_100, whose products come back from a memory of their own, ptxas takes all 255 registers
    # and may spill up to 64 bytes where the two loops over keys meet, outside of both.
    # The longest rows of causal attention are begun first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    offset = T - S
    row = block * TILE_S + tl.arange(0, TILE_S)
    s = row.to(tl.int64)[:, None]
    q_row = q_ptr + b * q_b + h * q_h + s * q_s
    k_head = k_ptr + b * k_b + (h // SHARED) * k_g
    real = (row < S)[:, None]
    d = tl.arange(0, PART_D)[None, :]
    q = tl.load(q_row + d.to(tl.int64) * q_d, real & (d < D), other=0.0)
    top = tl.full((TILE_S,), float("-inf"), tl.float32)
    l = tl.zeros((TILE_S,), tl.float32)  # noqa: E741
    u = tl.zeros((TILE_S,), tl.float32)
    n = tl.zeros((TILE_S,), tl.float32)
    first = 0
    last = T
    whole = T // TILE_T * TILE_T
    if CAUSAL:
        last = tl.maximum(tl.minimum(T, (block + 1) * TILE_S + offset), 0)
        whole = tl.maximum(tl.minimum(T, block * TILE_S + offset + 1) // TILE_T * TILE_T, 0)
    if WINDOW > 0:
        first = tl.maximum(0, (block * TILE_S + offset - WINDOW + 1) // TILE_T * TILE_T)
        if not CAUSAL:
            last = tl.maximum(tl.minimum(T, (block + 1) * TILE_S + offset + WINDOW), 0)
    if WINDOW > 0 or MASKED or BIASED:
        whole = first
    # Blocks of keys that every row sees need no masks.
    for start in tl.range(first, whole, TILE_T):  # pyright: ignore
        t = start + tl.arange(0, TILE_T)
        everywhere = (t < T)[None, :]  # known to hold
        score = scale * _products(
            q, q_row, k_head + t[None, :].to(tl.int64) * k_t, q_d, k_d, real, everywhere,
            D, TILE_D, PART_D, PRECISION,
        )  # fmt: skip
        if CAPPED:
            score = cap * 1.4426950408889634 * _tanh(score / cap)
        top, l, u, n = _merge(score, score == score, top, l, u, n, False)  # noqa: E741, FBT003, PLR0124
        n += TILE_T
    for start in tl.range(whole, last, TILE_T):  # pyright: ignore
        t = start + tl.arange(0, TILE_T)
        inside = (t < T)[None, :]
        score = scale * _products(
            q, q_row, k_head + t[None, :].to(tl.int64) * k_t, q_d, k_d, real, inside,
            D, TILE_D, PART_D, PRECISION,
        )  # fmt: skip
        if CAPPED:
            score = cap * 1.4426950408889634 * _tanh(score / cap)
        ahead = t[None, :] - row[:, None] - offset
        seen = inside & (row < S)[:, None]
        if CAUSAL:
            seen = seen & (ahead <= 0)
        if WINDOW > 0:
            seen = seen & (ahead > -WINDOW)
            if not CAUSAL:
                seen = seen & (ahead < WINDOW)
        wide = t[None, :].to(tl.int64)
        if BIASED:
            spot = bias_ptr + b * bias_b + h * bias_h + s * bias_s + wide * bias_t
            bias = tl.load(spot, inside & (row < S)[:, None], other=0.0).to(tl.float32)
            seen = seen & (bias > lowest)
            # Far below what any score is, and still finite in units of log₂ e.
            score += tl.maximum(tl.where(bias > lowest, bias, 0.0), -1e38) * 1.4426950408889634
        if MASKED:
            spot = mask_ptr + b * mask_b + h * mask_h + s * mask_s + wide * mask_t
            seen = seen & (tl.load(spot, inside & (row < S)[:, None], other=0) != 0)
        top, l, u, n = _merge(score, seen, top, l, u, n, True)  # noqa: E741, FBT003
    ok = (row < S) & (n > 0)
    if PADDED:
        spot = valid_ptr + b * valid_b + row.to(tl.int64) * valid_s
        ok = ok & (tl.load(spot, row < S, other=0) != 0)
    l = tl.where(n > 0, l, 1.0)  # noqa: E741
    entropy = tl.where(ok, 0.6931471805599453 * (tl.math.log2(l) - u / l), 0.0)
    log_keys = tl.where(ok, 0.6931471805599453 * tl.math.log2(tl.where(ok, n, 1.0)), 0.0)
    size = tl.num_programs(0).to(tl.int64)
    spot = partial_ptr + (b * tl.num_programs(1) + h) * size + block
    part = size * tl.num_programs(1) * tl.num_programs(2)
    tl.store(spot, tl.sum(entropy, 0))
    tl.store(spot + part, tl.sum(log_keys, 0))
    tl.store(spot + 2 * part, tl.sum(ok.to(tl.float32), 0))
