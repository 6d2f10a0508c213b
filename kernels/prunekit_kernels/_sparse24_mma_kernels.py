"""Triton kernels of the 2:4 product on sparse tensor cores.

Each thread must own one lane's four registers. Triton lays out tensors [32 · warps, 4] of loaded
int32 so; ``tests/aot`` checks it.

Source: PTX ISA, mma.sp::ordered_metadata (sm_80 and newer).
Shapes: T tokens, O output features; groups of 8 tokens, tiles of 16 rows, chunks of 256 columns.
"""

from functools import cache

import torch

from prunekit_kernels._triton import tl, triton


@cache
def products(dtype: torch.dtype) -> tuple[str, str]:
    """Return the assembly of eight accumulating products, and its constraints.

    Operands: 0-3 the sum; for each product 4 registers of values, then for each 4 of tokens; 4 of
    metadata, each for two products; 4 of the initial sum.
    """
    lines = [
        _product(dtype, step, 4 + 4 * step, _registers(36 + 4 * step), 68, 72) for step in range(8)
    ]
    return "\n".join(lines), ",".join(["=&f"] * 4 + ["r"] * 68 + ["f"] * 4)


@cache
def reading_products(dtype: torch.dtype) -> tuple[str, str]:
    """Return the same for tokens that the assembly reads through L1.

    Triton would stage them in shared memory together with the weight. Operands: 0-3 the sum; for
    each product 4 registers of values; 4 of metadata; 4 addresses of words of tokens in the first
    product, those of the next are 64 bytes further; 4 of the initial sum.
    """
    lines = ["{", ".reg .b32 x<32>;"]
    for step in range(8):
        lines += [
            f"ld.global.nc.b32 x{4 * step + word}, [${40 + word}+{64 * step}];" for word in range(4)
        ]
    for step in range(8):
        tokens = "{" + ",".join(f"x{4 * step + word}" for word in range(4)) + "}"
        lines.append(_product(dtype, step, 4 + 4 * step, tokens, 36, 44))
    constraints = ["=&f"] * 4 + ["r"] * 36 + ["l"] * 4 + ["f"] * 4
    return "\n".join([*lines, "}"]), ",".join(constraints)


def _product(dtype: torch.dtype, step: int, weight: int, tokens: str, meta: int, begin: int) -> str:
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    start = _registers(begin if step == 0 else 0)
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
        f"{_registers(0)}, {_registers(weight)}, {tokens}, {start}, "
        f"${meta + step // 2}, 0x{step % 2};"
    )


def _registers(first: int) -> str:
    return "{" + ",".join(f"${first + i}" for i in range(4)) + "}"


@triton.jit
def order_kernel(x_ptr, out_ptr, T, CHUNKS, stride_x_t):
    chunk, group = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, 1024)  # 8 products × 32 lanes × 4 registers
    lane, register = index // 4 % 32, index % 4
    t = group * 8 + lane // 4
    word = chunk * 128 + index // 128 * 16 + lane % 4 + 4 * register
    x = tl.load(x_ptr + t.to(tl.int64) * stride_x_t + word, t < T, other=0)  # [1024]
    tl.store(out_ptr + (group.to(tl.int64) * CHUNKS + chunk) * 1024 + index, x)


@triton.jit
def _load8(ptrs, inside):
    """Load a lane's registers for eight products, [32 * WARPS, 4] each."""
    return (
        tl.load(ptrs, inside, other=0), tl.load(ptrs + 128, inside, other=0),
        tl.load(ptrs + 256, inside, other=0), tl.load(ptrs + 384, inside, other=0),
        tl.load(ptrs + 512, inside, other=0), tl.load(ptrs + 640, inside, other=0),
        tl.load(ptrs + 768, inside, other=0), tl.load(ptrs + 896, inside, other=0),
    )  # fmt: skip


@triton.jit
def _store(out_ptr, total, tile, lane, t, T, O):  # noqa: E741
    register = tl.arange(0, 4)[None, :]
    t = t + 2 * (lane % 4)[:, None] + register % 2
    o = 16 * tile[:, None] + (lane // 4)[:, None] + 8 * (register // 2)
    ptrs = out_ptr + t.to(tl.int64) * O + o
    tl.store(ptrs, total.to(out_ptr.dtype.element_ty), (t < T) & (o < O))


@triton.jit
def _store4(out_ptr, total0, total1, total2, total3, tile, lane, t, T, O):  # noqa: E741
    _store(out_ptr, total0, tile, lane, t, T, O)
    _store(out_ptr, total1, tile, lane, t + 8, T, O)
    _store(out_ptr, total2, tile, lane, t + 16, T, O)
    _store(out_ptr, total3, tile, lane, t + 24, T, O)


@triton.jit
def _multiply(
    w0, w1, w2, w3, w4, w5, w6, w7, x0, x1, x2, x3, x4, x5, x6, x7, meta, total,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Return ``total`` plus eight products."""
    return tl.inline_asm_elementwise(
        ASM, CONSTRAINTS,
        [w0, w1, w2, w3, w4, w5, w6, w7, x0, x1, x2, x3, x4, x5, x6, x7, meta, total],
        dtype=tl.float32, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _read_and_multiply(
    w0, w1, w2, w3, w4, w5, w6, w7, meta, x_ptrs, total,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Return ``total`` plus eight products with the tokens at ``x_ptrs``."""
    return tl.inline_asm_elementwise(
        ASM, CONSTRAINTS, [w0, w1, w2, w3, w4, w5, w6, w7, meta, x_ptrs.to(tl.int64), total],
        dtype=tl.float32, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _store_tile(out_ptr, total, t, T, O, WARPS: tl.constexpr):  # noqa: E741
    """Sum a tile over warps and store it."""
    total = tl.sum(tl.reshape(total, (WARPS, 32, 4)), 0)  # [32, 4]
    lane, register = tl.arange(0, 32)[:, None], tl.arange(0, 4)[None, :]
    t += 2 * (lane % 4) + register % 2
    o = 16 * tl.program_id(0) + lane // 4 + 8 * (register // 2)
    ptrs = out_ptr + t.to(tl.int64) * O + o
    tl.store(ptrs, total.to(out_ptr.dtype.element_ty), t < T)


@triton.jit
def few_kernel(
    values_ptr, meta_ptr, x_ptr, out_ptr, T, O, CHUNKS, stride_x_t,  # noqa: E741
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr,
    WARPS: tl.constexpr, STAGES: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    # A program takes 16 rows, and its warps take turns at their chunks. While a chunk is
    # multiplied, STAGES - 1 others are on their way for each warp, 4.6 KiB each.
    thread = tl.arange(0, 32 * WARPS)
    lane, chunk = (thread % 32)[:, None], (thread // 32)[:, None]
    register = tl.arange(0, 4)[None, :]
    first = tl.program_id(0).to(tl.int64) * CHUNKS + chunk
    values_ptr += first * 1024 + lane * 4 + register
    meta_ptr += first * 128 + lane * 4 + register
    # Tokens past the last are read from the last, and not stored.
    word = lane % 4 + 4 * register
    x_ptrs = x_ptr + tl.minimum(lane // 4, T - 1).to(tl.int64) * stride_x_t + word
    y_ptrs = x_ptr + tl.minimum(lane // 4 + 8, T - 1).to(tl.int64) * stride_x_t + word
    total = tl.zeros((32 * WARPS, 4), tl.float32)
    other = tl.zeros((32 * WARPS, 4), tl.float32)
    for start in tl.range(0, CHUNKS, WARPS, num_stages=STAGES):  # pyright: ignore
        here = start + chunk < CHUNKS
        inside = here & (register >= 0)
        w0, w1, w2, w3, w4, w5, w6, w7 = _load8(values_ptr, inside)
        # Valid metadata where there is no weight.
        meta = tl.load(meta_ptr, inside, other=0x44444444)
        offset = tl.where(here, (start + chunk) * 128, 0)
        total = _read_and_multiply(
            w0, w1, w2, w3, w4, w5, w6, w7, meta, x_ptrs + offset, total, ASM, CONSTRAINTS
        )
        if PAIR:
            other = _read_and_multiply(
                w0, w1, w2, w3, w4, w5, w6, w7, meta, y_ptrs + offset, other, ASM, CONSTRAINTS
            )
        values_ptr += 1024 * WARPS
        meta_ptr += 128 * WARPS
    _store_tile(out_ptr, total, 0, T, O, WARPS)
    if PAIR:
        _store_tile(out_ptr, other, 8, T, O, WARPS)


@triton.jit
def many_kernel(  # noqa: PLR0915  registers have no index, so each is named
    values_ptr, meta_ptr, x_ptr, out_ptr, T, O, CHUNKS,  # noqa: E741
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    tile = (tl.program_id(0).to(tl.int64) * WARPS + thread // 32) * 2
    group = tl.program_id(1) * 4
    own = lane[:, None] * 4 + tl.arange(0, 4)[None, :]
    upper = (16 * tile < O)[:, None] & (own >= 0)
    lower = (16 * tile + 16 < O)[:, None] & (own >= 0)
    values_ptr += tile[:, None] * CHUNKS * 1024 + own
    meta_ptr += tile[:, None] * CHUNKS * 128 + own
    x_ptr += group.to(tl.int64) * CHUNKS * 1024 + own
    groups = (T + 7) // 8
    zero = tl.zeros((32 * WARPS, 4), tl.float32)
    a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
    for _ in tl.range(0, CHUNKS):  # pyright: ignore
        u0, u1, u2, u3, u4, u5, u6, u7 = _load8(values_ptr, upper)
        l0, l1, l2, l3, l4, l5, l6, l7 = _load8(values_ptr + CHUNKS * 1024, lower)
        mu = tl.load(meta_ptr, upper, other=0x44444444)
        ml = tl.load(meta_ptr + CHUNKS * 128, lower, other=0x44444444)
        for m in tl.static_range(0, 4):  # pyright: ignore
            here = (own >= 0) & (group + m < groups)
            x0, x1, x2, x3, x4, x5, x6, x7 = _load8(x_ptr + m * CHUNKS * 1024, here)
            a = a0 if m == 0 else a1 if m == 1 else a2 if m == 2 else a3
            b = b0 if m == 0 else b1 if m == 1 else b2 if m == 2 else b3
            a = _multiply(
                u0, u1, u2, u3, u4, u5, u6, u7, x0, x1, x2, x3, x4, x5, x6, x7, mu, a,
                ASM, CONSTRAINTS,
            )  # fmt: skip
            b = _multiply(
                l0, l1, l2, l3, l4, l5, l6, l7, x0, x1, x2, x3, x4, x5, x6, x7, ml, b,
                ASM, CONSTRAINTS,
            )  # fmt: skip
            if m == 0:
                a0, b0 = a, b
            elif m == 1:
                a1, b1 = a, b
            elif m == 2:
                a2, b2 = a, b
            else:
                a3, b3 = a, b
        values_ptr += 1024
        meta_ptr += 128
        x_ptr += 1024
    _store4(out_ptr, a0, a1, a2, a3, tile, lane, 8 * group, T, O)
    _store4(out_ptr, b0, b1, b2, b3, tile + 1, lane, 8 * group, T, O)
