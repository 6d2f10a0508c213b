"""2:4 product on sparse tensor cores: y = x Wᵀ with W in fragment order.

The weight streams from memory straight into ``mma.sp``: no expansion, no shared memory, no shuffle.
One inline assembly block multiplies 256 columns: eight products of 16 rows, 32 columns, 8 tokens.

    up to 16 tokens    a warp takes 16 rows and a share of the columns; shares are summed in order
    up to ``reach``    a warp takes 32 rows and 32 tokens
    more               back to row order, expanded to memory, multiplied dense

Each thread must own one lane's four registers. Triton lays tensors [32 · warps, 4] of loaded int32
out so; ``tests/aot`` holds it to that.

Source: PTX ISA, mma.sp::ordered_metadata (sm_80 and newer).
Shapes: T tokens, O output features (multiple of 16), I input features (multiple of 256), H = I / 2,
B = I / 8; P groups of 8 tokens.
"""

from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from prunekit_kernels._triton import INTERPRETED, tl, triton
from prunekit_kernels.fragments24 import TOKENS, from_fragments, has_fragments
from prunekit_kernels.sparse24 import Sparse24, check24, expand24
from prunekit_kernels.sparse24_matmul import (
    FEW,
    PROGRAMS,
    REACH,
    _sparse24_matmul,
    check_inputs,
    remember,
)

WARPS = 4


def sparse24_mma(
    x: Float[Tensor, "T I"],
    values: Float[Tensor, "O H"],
    keep: UInt8[Tensor, "O B"],
    reach: int | None = None,
) -> Float[Tensor, "T O"]:
    """Return ``x Wᵀ`` of a W in fragment order, summed in float32.

    Args:
        x: Of the type of ``values``; any strides.
        values: Float16 or bfloat16, contiguous, as
            :func:`prunekit_kernels.fragments24.to_fragments` gives them.
        keep: Metadata, likewise.
        reach: With more tokens than this the weight is expanded to memory first; None: 256, where
            nothing was measured.

    Raises:
        ValueError: Shapes, types or devices do not belong together.
    """
    check24(values, keep)
    check_inputs(x, 2 * values.shape[1], values)
    if not has_fragments(len(values), x.shape[1], x.dtype):
        raise ValueError(
            "fragment order needs 16-bit floats, outputs in multiples of 16 and inputs of 256, "
            f"got {x.dtype}, {len(values)} and {x.shape[1]}"
        )
    return _sparse24_mma(x, values, keep, REACH if reach is None else reach)


def runs_mma(x: Tensor) -> bool:
    """Say whether ``x`` is where sparse tensor cores are: an NVIDIA GPU from Ampere on."""
    if not x.is_cuda or torch.version.hip or INTERPRETED:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def sparse24_mma_reference(x: Tensor, values: Tensor, keep: Tensor, reach: int = REACH) -> Tensor:
    """Say the same from row order; the kernels are tested against it."""
    return _sparse24_matmul(x, *from_fragments(Sparse24(values, keep)), reach)


@torch.library.custom_op("prunekit::sparse24_mma", mutates_args=())
def _sparse24_mma(x: Tensor, values: Tensor, keep: Tensor, reach: int) -> Tensor:
    if not x.numel() or not values.numel() or len(x) > reach or not runs_mma(x):
        return sparse24_mma_reference(x, values, keep, reach)
    return _launch_few(x, values, keep) if len(x) <= FEW else _launch_many(x, values, keep)


@_sparse24_mma.register_fake
def _(x: Tensor, values: Tensor, keep: Tensor, reach: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(len(x), len(values))


@partial(_sparse24_mma.register_autograd, setup_context=remember)
def _(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad @ expand24(*from_fragments(Sparse24(*ctx.saved_tensors))), None, None, None


def _launch_few(x: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    tokens, outputs, chunks = len(x), len(values), x.shape[1] // 256
    rows = triton.cdiv(outputs, 16 * WARPS)
    splits = max(1, min(chunks, PROGRAMS // rows))
    parts = torch.empty(splits, tokens, outputs, dtype=torch.float32, device=x.device)
    asm, constraints = products(x.dtype)
    with torch.cuda.device_of(x):
        _few_kernel[(rows, splits, triton.cdiv(tokens, TOKENS))](
            values.view(torch.int32), keep.view(torch.int32), in_lane_order(x), parts,
            tokens, outputs, chunks, triton.cdiv(chunks, splits),
            ASM=asm, CONSTRAINTS=constraints, WARPS=WARPS,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return _summed(parts, x.dtype)


def _launch_many(x: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    tokens, outputs, chunks = len(x), len(values), x.shape[1] // 256
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    asm, constraints = products(x.dtype)
    grid = (triton.cdiv(outputs, 32 * WARPS), triton.cdiv(tokens, 4 * TOKENS))
    with torch.cuda.device_of(x):
        _many_kernel[grid](
            values.view(torch.int32), keep.view(torch.int32), in_lane_order(x), out,
            tokens, outputs, chunks,
            ASM=asm, CONSTRAINTS=constraints, WARPS=WARPS,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def in_lane_order(x: Tensor) -> Tensor:
    """Return :func:`prunekit_kernels.fragments24.token_fragments` of ``x``, in one launch."""
    if x.stride(1) != 1 or x.stride(0) % 2 or x.storage_offset() % 2:
        x = x.clone(memory_format=torch.contiguous_format)  # one token's stride may be anything
    words = x.view(torch.int32)
    tokens, chunks = len(x), x.shape[1] // 256
    groups = triton.cdiv(tokens, TOKENS)
    out = torch.empty(groups, 8 * chunks, 32, 4, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _order_kernel[(chunks, groups)](
            words, out, tokens, chunks, words.stride(0), num_warps=4, enable_fp_fusion=True
        )
    return out


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of the shares, in order, in one launch."""
    splits, tokens, outputs = parts.shape
    out = torch.empty(tokens, outputs, dtype=dtype, device=parts.device)
    with torch.cuda.device_of(parts):
        _sum_kernel[(triton.cdiv(out.numel(), 1024),)](
            parts, out, out.numel(), splits, num_warps=4, enable_fp_fusion=True
        )
    return out


def products(dtype: torch.dtype) -> tuple[str, str]:
    """Return the assembly of eight products that add up, and its constraints.

    Operands: 0-3 the sum; for each product 4 registers of values, then for each 4 of tokens; 4 of
    metadata, each for two products; 4 that the sum begins with.
    """
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    lines = []
    for step in range(8):
        weight, token = 4 + 4 * step, 36 + 4 * step
        begin = _registers(72) if step == 0 else _registers(0)
        lines.append(
            f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
            f"{_registers(0)}, {_registers(weight)}, {_registers(token)}, {begin}, "
            f"${68 + step // 2}, 0x{step % 2};"
        )
    return "\n".join(lines), ",".join(["=&f"] * 4 + ["r"] * 68 + ["f"] * 4)


def _registers(first: int) -> str:
    return "{" + ",".join(f"${first + i}" for i in range(4)) + "}"


@triton.jit
def _order_kernel(x_ptr, out_ptr, T, CHUNKS, stride_t):
    chunk, group = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, 1024)  # 8 products of 32 lanes of 4 registers
    lane, register = place // 4 % 32, place % 4
    t = group * 8 + lane // 4
    word = chunk * 128 + place // 128 * 16 + lane % 4 + 4 * register
    x = tl.load(x_ptr + t.to(tl.int64) * stride_t + word, t < T, other=0)
    tl.store(out_ptr + (group.to(tl.int64) * CHUNKS + chunk) * 1024 + place, x)


@triton.jit
def _sum_kernel(parts_ptr, out_ptr, N, SPLITS):
    i = tl.program_id(0).to(tl.int64) * 1024 + tl.arange(0, 1024)
    total = tl.zeros((1024,), tl.float32)
    for _ in range(SPLITS):
        total += tl.load(parts_ptr + i, i < N, other=0.0)
        parts_ptr += N
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), i < N)


@triton.jit
def _load8(ptr, inside):
    """Load what a lane brings to eight products."""
    return (
        tl.load(ptr, inside, other=0), tl.load(ptr + 128, inside, other=0),
        tl.load(ptr + 256, inside, other=0), tl.load(ptr + 384, inside, other=0),
        tl.load(ptr + 512, inside, other=0), tl.load(ptr + 640, inside, other=0),
        tl.load(ptr + 768, inside, other=0), tl.load(ptr + 896, inside, other=0),
    )  # fmt: skip


@triton.jit
def _store(out_ptr, total, tile, lane, t, T, O):  # noqa: E741
    register = tl.arange(0, 4)[None, :]
    t = t + 2 * (lane % 4)[:, None] + register % 2
    o = 16 * tile[:, None] + (lane // 4)[:, None] + 8 * (register // 2)
    spot = out_ptr + t.to(tl.int64) * O + o
    tl.store(spot, total.to(out_ptr.dtype.element_ty), (t < T) & (o < O))


@triton.jit
def _few_kernel(
    values_ptr, meta_ptr, x_ptr, partial_ptr, T, O, CHUNKS, SHARE,  # noqa: E741
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    tile = tl.program_id(0).to(tl.int64) * WARPS + thread // 32
    split = tl.program_id(1)
    group = tl.program_id(2)
    first = split * SHARE
    own = lane[:, None] * 4 + tl.arange(0, 4)[None, :]
    chunk = tile * CHUNKS + first
    inside = (16 * tile < O)[:, None] & (own >= 0)
    values_ptr += chunk[:, None] * 1024 + own
    meta_ptr += chunk[:, None] * 128 + own
    x_ptr += (group.to(tl.int64) * CHUNKS + first) * 1024 + own
    total = tl.zeros((32 * WARPS, 4), tl.float32)
    for _ in tl.range(0, tl.minimum(SHARE, CHUNKS - first)):  # pyright: ignore
        w0, w1, w2, w3, w4, w5, w6, w7 = _load8(values_ptr, inside)
        meta = tl.load(meta_ptr, inside, other=0)
        x0, x1, x2, x3, x4, x5, x6, x7 = _load8(x_ptr, own >= 0)
        total = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS,
            [w0, w1, w2, w3, w4, w5, w6, w7, x0, x1, x2, x3, x4, x5, x6, x7, meta, total],
            dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
        values_ptr += 1024
        meta_ptr += 128
        x_ptr += 1024
    out_ptr = partial_ptr + split.to(tl.int64) * T * O
    _store(out_ptr, total, tile, lane, 8 * group, T, O)


@triton.jit
def _multiply(
    w0, w1, w2, w3, w4, w5, w6, w7, x0, x1, x2, x3, x4, x5, x6, x7, meta, total,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    return tl.inline_asm_elementwise(
        ASM, CONSTRAINTS,
        [w0, w1, w2, w3, w4, w5, w6, w7, x0, x1, x2, x3, x4, x5, x6, x7, meta, total],
        dtype=tl.float32, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _many_kernel(  # noqa: PLR0915  registers have no index, so each is named
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
        mu = tl.load(meta_ptr, upper, other=0)
        ml = tl.load(meta_ptr + CHUNKS * 128, lower, other=0)
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
    _store(out_ptr, a0, tile, lane, 8 * group, T, O)
    _store(out_ptr, a1, tile, lane, 8 * group + 8, T, O)
    _store(out_ptr, a2, tile, lane, 8 * group + 16, T, O)
    _store(out_ptr, a3, tile, lane, 8 * group + 24, T, O)
    _store(out_ptr, b0, tile + 1, lane, 8 * group, T, O)
    _store(out_ptr, b1, tile + 1, lane, 8 * group + 8, T, O)
    _store(out_ptr, b2, tile + 1, lane, 8 * group + 16, T, O)
    _store(out_ptr, b3, tile + 1, lane, 8 * group + 24, T, O)
