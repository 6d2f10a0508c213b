"""Triton kernel of attention entropy: online softmax over blocks of keys.

Shapes: B sequences, H heads, G key heads, S queries, T keys, D head dimension. One program handles
TILE_S queries of one head; scores are in units of log₂ e.
"""

from prunekit_kernels._triton import tl, triton


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.math.exp2(x * 2.8853900817779268))


@triton.jit
def _products(
    q, q_ptrs, k_ptrs, stride_q_d, stride_k_d, inside_s, inside_t,
    D: tl.constexpr, TILE_D: tl.constexpr, PART_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return q·k; ``q`` holds the first PART_D dimensions, others are loaded."""
    d = tl.arange(0, PART_D).to(tl.int64)
    ptrs = k_ptrs + d[:, None] * stride_k_d
    k = tl.load(ptrs, (d < D)[:, None] & inside_t, other=0.0)  # [PART_D, TILE_T]
    total = tl.dot(q, k, input_precision=PRECISION)  # [TILE_S, TILE_T]
    for _ in range(PART_D, TILE_D, PART_D):
        d += PART_D
        left = tl.load(q_ptrs + d[None, :] * stride_q_d, inside_s & (d < D)[None, :], other=0.0)
        k = tl.load(k_ptrs + d[:, None] * stride_k_d, (d < D)[:, None] & inside_t, other=0.0)
        total = tl.dot(left, k, total, input_precision=PRECISION)
    return total


@triton.jit
def _merge(score, seen, top, l, u, n, GUARDED: tl.constexpr):  # noqa: E741
    """Add a block of scores to the running sums of its rows."""
    if GUARDED:
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    # Before the first visible key any finite base will do.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    x = score - base[:, None]
    e = tl.math.exp2(x)
    if GUARDED:  # 0 · −∞ is NaN
        x = tl.where(e > 0, x, 0.0)
        n += tl.sum(seen.to(tl.float32), 1)
    delta = tl.where(top == float("-inf"), 0.0, top - base)
    shrink = tl.where(top == float("-inf"), 0.0, tl.math.exp2(delta))
    u = shrink * (u + delta * l) + tl.sum(e * x, 1)
    l = shrink * l + tl.sum(e, 1)  # noqa: E741
    return higher, l, u, n


@triton.jit
def _add_bias(score, seen, bias, lowest):
    """Add a bias; at or below ``lowest`` it hides the key."""
    seen = seen & (bias > lowest)
    # The clamp is far below any score, yet finite in units of log₂ e.
    score += tl.maximum(tl.where(bias > lowest, bias, 0.0), -1e38) * 1.4426950408889634
    return score, seen


@triton.jit
def _accumulate(  # noqa: C901  branches are resolved at compile time
    first, last, row, offset, T, q, q_ptrs, k_ptrs, mask_ptrs, bias_ptrs, inside_s, top, l, u, n,  # noqa: E741
    stride_q_d, stride_k_t, stride_k_d, stride_mask_t, stride_bias_t, scale, cap, lowest,
    GUARDED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr, BIASED: tl.constexpr, D: tl.constexpr, TILE_D: tl.constexpr,
    PART_D: tl.constexpr, TILE_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Merge a range of keys; GUARDED masks those that are hidden."""
    for start in tl.range(first, last, TILE_T):  # pyright: ignore
        t = start + tl.arange(0, TILE_T)
        inside = (t < T)[None, :]  # known to hold unless GUARDED
        score = scale * _products(
            q, q_ptrs, k_ptrs + t[None, :].to(tl.int64) * stride_k_t, stride_q_d, stride_k_d,
            inside_s, inside, D, TILE_D, PART_D, PRECISION,
        )  # fmt: skip
        if CAPPED:
            score = cap * 1.4426950408889634 * _tanh(score / cap)
        seen = score == score  # noqa: PLR0124
        if GUARDED:
            ahead = t[None, :] - row[:, None] - offset
            seen = inside & inside_s
            if CAUSAL:
                seen = seen & (ahead <= 0)
            if WINDOW > 0:
                seen = seen & (ahead > -WINDOW)
                if not CAUSAL:
                    seen = seen & (ahead < WINDOW)
            if BIASED:
                ptrs = bias_ptrs + t[None, :].to(tl.int64) * stride_bias_t
                bias = tl.load(ptrs, inside & inside_s, other=0.0).to(tl.float32)
                score, seen = _add_bias(score, seen, bias, lowest)
            if MASKED:
                ptrs = mask_ptrs + t[None, :].to(tl.int64) * stride_mask_t
                seen = seen & (tl.load(ptrs, inside & inside_s, other=0) != 0)
        top, l, u, n = _merge(score, seen, top, l, u, n, GUARDED)  # noqa: E741
        if not GUARDED:
            n += TILE_T
    return top, l, u, n


@triton.jit
def _key_bounds(
    block, offset, T, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    TILE_S: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    """Return the bounds of keys seen by all rows, and by some."""
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
    if WINDOW > 0 or MASKED:
        whole = first
    return first, whole, last


@triton.jit
def _store_sums(partial_ptr, b, h, block, l, u, n, ok):  # noqa: E741
    """Store the three sums over the valid rows of a program."""
    l = tl.where(n > 0, l, 1.0)  # noqa: E741
    entropy = tl.where(ok, 0.6931471805599453 * (tl.math.log2(l) - u / l), 0.0)
    log_keys = tl.where(ok, 0.6931471805599453 * tl.math.log2(tl.where(ok, n, 1.0)), 0.0)
    blocks = tl.num_programs(0).to(tl.int64)
    ptrs = partial_ptr + (b * tl.num_programs(1) + h) * blocks + block
    stride_sum = blocks * tl.num_programs(1) * tl.num_programs(2)
    tl.store(ptrs, tl.sum(entropy, 0))
    tl.store(ptrs + stride_sum, tl.sum(log_keys, 0))
    tl.store(ptrs + 2 * stride_sum, tl.sum(ok.to(tl.float32), 0))


@triton.jit
def kernel(
    q_ptr, k_ptr, mask_ptr, bias_ptr, valid_ptr, partial_ptr, S, T, SHARED,
    stride_q_b, stride_q_h, stride_q_s, stride_q_d, stride_k_b, stride_k_g, stride_k_t, stride_k_d,
    stride_mask_b, stride_mask_h, stride_mask_s, stride_mask_t, stride_bias_b, stride_bias_h,
    stride_bias_s, stride_bias_t, stride_valid_b, stride_valid_s, scale, cap, lowest,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
    BIASED: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, TILE_D: tl.constexpr,
    PART_D: tl.constexpr, TILE_S: tl.constexpr, TILE_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # On sm_100, whose products return through a memory of their own, ptxas takes all 255 registers
    # and may spill up to 64 bytes between the two loops over keys.
    # The longest rows of causal attention start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    offset = T - S
    row = block * TILE_S + tl.arange(0, TILE_S)
    s = row.to(tl.int64)[:, None]
    q_ptrs = q_ptr + b * stride_q_b + h * stride_q_h + s * stride_q_s
    k_ptrs = k_ptr + b * stride_k_b + (h // SHARED) * stride_k_g
    inside_s = (row < S)[:, None]
    d = tl.arange(0, PART_D)[None, :]
    ptrs = q_ptrs + d.to(tl.int64) * stride_q_d
    q = tl.load(ptrs, inside_s & (d < D), other=0.0)  # [TILE_S, PART_D]
    top = tl.full((TILE_S,), float("-inf"), tl.float32)
    l, u, n = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)  # noqa: E741
    first, whole, last = _key_bounds(
        block, offset, T, CAUSAL, WINDOW, MASKED or BIASED, TILE_S, TILE_T
    )
    # Keys that every row sees need no masks.
    top, l, u, n = _accumulate(  # noqa: E741
        first, whole, row, offset, T, q, q_ptrs, k_ptrs, mask_ptr, bias_ptr, inside_s,
        top, l, u, n, stride_q_d, stride_k_t, stride_k_d, stride_mask_t, stride_bias_t,
        scale, cap, lowest, False, CAUSAL, WINDOW, CAPPED, MASKED, BIASED,  # noqa: FBT003
        D, TILE_D, PART_D, TILE_T, PRECISION,
    )  # fmt: skip
    bias_ptrs = bias_ptr + b * stride_bias_b + h * stride_bias_h + s * stride_bias_s
    mask_ptrs = mask_ptr + b * stride_mask_b + h * stride_mask_h + s * stride_mask_s
    top, l, u, n = _accumulate(  # noqa: E741
        whole, last, row, offset, T, q, q_ptrs, k_ptrs, mask_ptrs, bias_ptrs, inside_s,
        top, l, u, n, stride_q_d, stride_k_t, stride_k_d, stride_mask_t, stride_bias_t,
        scale, cap, lowest, True, CAUSAL, WINDOW, CAPPED, MASKED, BIASED,  # noqa: FBT003
        D, TILE_D, PART_D, TILE_T, PRECISION,
    )  # fmt: skip
    ok = (row < S) & (n > 0)
    if PADDED:
        ptrs = valid_ptr + b * stride_valid_b + row.to(tl.int64) * stride_valid_s
        ok = ok & (tl.load(ptrs, row < S, other=0) != 0)
    _store_sums(partial_ptr, b, h, block, l, u, n, ok)
