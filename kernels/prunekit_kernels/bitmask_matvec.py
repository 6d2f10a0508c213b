"""Bitmask product: y = x Wᵀ, W bitmask-compressed, for few tokens.

It reads 1 − s + 1/16 of the bytes of a dense 16-bit matrix at sparsity s. The bits of a row say
where its kept weights belong; the number of set bits before a column is the index of its weight.
Shapes: T tokens, O output features, I input features, K kept weights, B = ⌈I / 8⌉ bytes.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit_kernels._precision import dot_precision
from prunekit_kernels._triton import runs_triton, tl, triton
from prunekit_kernels.bitmask import (
    Bitmask,
    _expand_bitmask,
    check_bitmask,
    expand_bitmask_reference,
    load_bitmask,
    load_offsets,
)
from prunekit_kernels.sparse24_matmul import CHUNK, check_inputs

REACH = 16  # most tokens without expanding the weight, unless measured otherwise
MOST = 16  # most tokens of one launch
TILE_B = 32  # bytes of keep bits per step for one token; fixed: it sets the summation order
FEW_B = {2: 32, 4: 8}  # for several tokens, by weight size in bytes; more would spill


def bitmask_matvec(
    x: Float[Tensor, "T I"], compressed: Bitmask, reach: int | None = None
) -> Float[Tensor, "T O"]:
    """Return ``x Wᵀ`` for a compressed W, summed in float32.

    Args:
        x: Of the dtype of the values; any strides.
        compressed: From :func:`prunekit_kernels.bitmask.compress_bitmask`; values float32, float16
            or bfloat16.
        reach: With more tokens than this, or more than 16, the weight is expanded to memory first;
            None: 16.

    Raises:
        ValueError: Shapes, types or devices do not match.
    """
    check_bitmask(compressed, x.shape[1])
    check_inputs(x, x.shape[1], compressed.values)
    return _bitmask_matvec(x, *compressed, REACH if reach is None else reach)


def bitmask_matvec_reference(x: Tensor, compressed: Bitmask) -> Tensor:
    """Return the same in plain PyTorch."""
    return x @ expand_bitmask_reference(compressed.values, compressed.keep, x.shape[1]).T


@torch.library.custom_op("prunekit::bitmask_matvec", mutates_args=())
def _bitmask_matvec(
    x: Tensor, values: Tensor, keep: Tensor, row_offsets: Tensor, reach: int
) -> Tensor:
    if not runs_triton(x):
        return _in_chunks(x, values, keep, row_offsets)
    out = torch.empty(len(x), len(keep), dtype=x.dtype, device=x.device)
    if not x.numel() or not out.numel():
        return out.zero_()
    if len(x) > min(reach, MOST):
        return torch.mm(x, _expand_bitmask(values, keep, row_offsets, x.shape[1]).T, out=out)
    return _launch(x, Bitmask(values, keep, row_offsets), out)


@_bitmask_matvec.register_fake
def _(x: Tensor, values: Tensor, keep: Tensor, row_offsets: Tensor, reach: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], keep.shape[0])  # len() would fix the number of tokens


def _remember(ctx, inputs, output) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:4])
    ctx.inputs = inputs[0].shape[1]


@partial(_bitmask_matvec.register_autograd, setup_context=_remember)
def _(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad @ _expand_bitmask(*ctx.saved_tensors, ctx.inputs), None, None, None, None


def _in_chunks(x: Tensor, values: Tensor, keep: Tensor, row_offsets: Tensor) -> Tensor:
    """Expand and multiply some rows at a time."""
    rows = max(1, CHUNK // max(1, x.shape[1]))
    if len(keep) <= rows:
        return x @ expand_bitmask_reference(values, keep, x.shape[1]).T
    out = x.new_empty(len(x), len(keep))
    for start in range(0, len(keep), rows):
        part, first = slice(start, start + rows), int(row_offsets[start].clamp(0, len(values)))
        weight = expand_bitmask_reference(values[first:], keep[part], x.shape[1])
        out[:, part] = x @ weight.T
    return out


def _launch(x: Tensor, compressed: Bitmask, out: Tensor) -> Tensor:
    tokens, inputs = x.shape
    values, keep, row_offsets = compressed
    single = tokens == 1
    kernel, tile = (_one_kernel, 4) if single else (_few_kernel, 16)
    extra = {} if single else {"TILE_T": MOST, "PRECISION": dot_precision()}
    tile_b = TILE_B if single else FEW_B[x.itemsize]
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(len(keep), tile),)](
            x, values, keep, row_offsets, out, len(values), tokens, len(keep), inputs,
            *x.stride(), *keep.stride(), *out.stride(),
            TILE_O=tile, TILE_B=tile_b, **extra, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit
def _one_kernel(
    x_ptr, values_ptr, keep_ptr, offsets_ptr, out_ptr, K, T, O, I,  # noqa: ARG001, E741
    stride_x_t, stride_x_i, stride_keep_o, stride_keep_b, stride_out_t, stride_out_o,  # noqa: ARG001
    TILE_O: tl.constexpr, TILE_B: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * TILE_O + tl.arange(0, TILE_O)
    offset = load_offsets(offsets_ptr, o, O, K)
    total = tl.zeros((TILE_O, 8 * TILE_B), tl.float32)
    for start in tl.range(0, (I + 7) // 8, TILE_B):  # pyright: ignore
        weight, offset = load_bitmask(
            values_ptr, keep_ptr, offset, K, o, O, start, I,
            stride_keep_o, stride_keep_b, TILE_O, TILE_B,
        )  # fmt: skip
        i = 8 * start + tl.arange(0, 8 * TILE_B)
        x = tl.load(x_ptr + i.to(tl.int64) * stride_x_i, i < I, other=0.0)  # [8 * TILE_B]
        total += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(total, 1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + o * stride_out_o, y, o < O)


@triton.jit
def _few_kernel(
    x_ptr, values_ptr, keep_ptr, offsets_ptr, out_ptr, K, T, O, I,  # noqa: E741
    stride_x_t, stride_x_i, stride_keep_o, stride_keep_b, stride_out_t, stride_out_o,
    TILE_O: tl.constexpr, TILE_B: tl.constexpr, TILE_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * TILE_O + tl.arange(0, TILE_O)
    t = tl.arange(0, TILE_T)
    offset = load_offsets(offsets_ptr, o, O, K)
    total = tl.zeros((TILE_O, TILE_T), tl.float32)
    for start in tl.range(0, (I + 7) // 8, TILE_B):  # pyright: ignore
        weight, offset = load_bitmask(
            values_ptr, keep_ptr, offset, K, o, O, start, I,
            stride_keep_o, stride_keep_b, TILE_O, TILE_B,
        )  # fmt: skip
        i = 8 * start + tl.arange(0, 8 * TILE_B)
        ptrs = x_ptr + t[None, :].to(tl.int64) * stride_x_t + i[:, None].to(tl.int64) * stride_x_i
        inside = (i < I)[:, None] & (t < T)[None, :]
        x = tl.load(ptrs, inside, other=0.0)  # [8 * TILE_B, TILE_T]
        total = tl.dot(weight, x, total, input_precision=PRECISION)
    ptrs = out_ptr + t[None, :].to(tl.int64) * stride_out_t + o[:, None] * stride_out_o
    tl.store(ptrs, total.to(out_ptr.dtype.element_ty), (o < O)[:, None] & (t < T)[None, :])
