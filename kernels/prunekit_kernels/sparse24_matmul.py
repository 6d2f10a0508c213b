"""2:4 product: y = x Wᵀ with W compressed 2:4.

It reads 0.5625 of the bytes of a dense matrix. Few tokens read the weight once and are bound by
that; many are bound by multiplying, where expanding once and multiplying dense is hard to beat:

    up to 16 tokens    the weight is split into its four columns: y = Σⱼ x[:, j::4] · W[:, j::4]ᵀ
    up to ``reach``    tiles of the weight are expanded in registers before a dense product
    more               the weight is expanded to memory, multiplied, and freed

On NVIDIA GPUs a weight in fragment order uses sparse tensor cores instead of the first two:
:mod:`prunekit_kernels.sparse24_mma`.
Shapes: T tokens, O output features, I input features (a multiple of 4), H = I / 2, B = ⌈I / 8⌉.
"""

from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from prunekit_kernels._precision import dot_precision
from prunekit_kernels._triton import runs_triton, tl, triton
from prunekit_kernels.sparse24 import check24, expand24, expand24_reference, interleave, load24

FEW = 16  # tokens of the smallest tensor-core tile
REACH = 256  # most tokens without expanding the weight, unless measured otherwise
CHUNK = 2**22  # weights expanded at a time on a CPU, so that no dense copy is held
PROGRAMS = 512  # target number where few output rows would leave most of a GPU idle
# Groups per step, by weight size in bytes; fixed: it sets the summation order. More would spill.
FEW_G = {2: 32, 4: 16}
TILES_G = {2: 16, 4: 8}


def sparse24_matmul(
    x: Float[Tensor, "T I"],
    values: Float[Tensor, "O H"],
    keep: UInt8[Tensor, "O B"],
    reach: int | None = None,
) -> Float[Tensor, "T O"]:
    """Return ``x Wᵀ`` for a compressed W, summed in float32.

    Args:
        x: Of the dtype of ``values``; any strides.
        values: Kept weights, float32, float16 or bfloat16.
        keep: Packed bits, from :func:`prunekit_kernels.sparse24.compress24`.
        reach: With more tokens than this the weight is expanded to memory first; None: 256, the
            default without a measurement.

    Raises:
        ValueError: Shapes, types or devices do not match.
    """
    check24(values, keep)
    check_inputs(x, 2 * values.shape[1], values)
    return _sparse24_matmul(x, values, keep, REACH if reach is None else reach)


def check_inputs(x: Tensor, inputs: int, values: Tensor) -> None:
    """Check that ``x`` fits a compressed weight.

    Args:
        x: Must be [T, inputs].
        inputs: Columns of the weight.
        values: Kept weights, whose dtype and device ``x`` must have.

    Raises:
        ValueError: The shape, dtype or device differs.
    """
    if x.shape[1:] != (inputs,) or x.dtype != values.dtype or x.device != values.device:
        raise ValueError(
            f"x must be {values.dtype} of shape [T, {inputs}] on {values.device}, "
            f"got {x.dtype} of shape {list(x.shape)} on {x.device}"
        )


def sparse24_matmul_reference(x: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    """Return the same in plain PyTorch.

    Args:
        x: [T, I].
        values: [O, H].
        keep: [O, B].
    """
    return x @ expand24_reference(values, keep).T


@torch.library.custom_op("prunekit::sparse24_matmul", mutates_args=())
def _sparse24_matmul(x: Tensor, values: Tensor, keep: Tensor, reach: int) -> Tensor:
    if not runs_triton(x):
        return _in_chunks(x, values, keep)
    out = torch.empty(len(x), len(values), dtype=x.dtype, device=x.device)
    if not x.numel() or not out.numel():
        return out.zero_()
    if len(x) > reach:
        return torch.mm(x, expand24(values, keep).T, out=out)
    if len(x) <= FEW:
        return _launch_few(x, values, keep, out)
    return _launch_tiles(x, values, keep, out)


@_sparse24_matmul.register_fake
def _(x: Tensor, values: Tensor, keep: Tensor, reach: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], values.shape[0])  # len() would fix the number of tokens


def remember(ctx, inputs, output) -> None:  # noqa: ARG001
    """Save the parts of the weight for the backward pass.

    Args:
        ctx: Autograd context.
        inputs: Inputs of the operator: ``x``, ``values``, ``keep``, ``reach``.
        output: Unused.
    """
    ctx.save_for_backward(*inputs[1:3])


@partial(_sparse24_matmul.register_autograd, setup_context=remember)
def _(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of ``x``; the compressed weight is fixed."""
    return grad @ expand24(*ctx.saved_tensors), None, None, None


def _in_chunks(x: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    """Expand and multiply some rows at a time."""
    rows = max(1, CHUNK // max(1, x.shape[1]))
    if len(values) <= rows:
        return x @ expand24_reference(values, keep).T
    out = x.new_empty(len(x), len(values))
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        out[:, part] = x @ expand24_reference(values[part], keep[part]).T
    return out


def _launch_few(x: Tensor, values: Tensor, keep: Tensor, out: Tensor) -> Tensor:
    tokens, outputs, groups = len(x), len(values), x.shape[1] // 4
    planes = x.unflatten(1, (-1, 4)).transpose(1, 2).contiguous()  # [T, 4, I / 4]
    tile, tile_g = 64, FEW_G[x.itemsize]
    rows, steps = triton.cdiv(outputs, tile), triton.cdiv(groups, tile_g)
    splits = max(1, min(steps, PROGRAMS // rows))
    parts = torch.empty(splits, tokens, outputs, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _few_kernel[(rows, splits)](
            planes, values, keep, parts, tokens, outputs, groups, triton.cdiv(steps, splits),
            *planes.stride(), *values.stride(), *keep.stride(),
            TILE_T=FEW, TILE_O=tile, TILE_G=tile_g, PRECISION=dot_precision(),
            num_warps=4, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
    return out.copy_(parts.sum(0))


def _launch_tiles(x: Tensor, values: Tensor, keep: Tensor, out: Tensor) -> Tensor:
    tokens, outputs, inputs = len(x), len(values), x.shape[1]
    # Float32 spills a few registers with the smaller tile.
    tile_t, tile_o = 64 if tokens > 32 or x.itemsize == 4 else 32, 64
    grid = (triton.cdiv(outputs, tile_o), triton.cdiv(tokens, tile_t))
    with torch.cuda.device_of(x):
        _tiles_kernel[grid](
            x, values, keep, out, tokens, outputs, inputs // 4,
            *x.stride(), *values.stride(), *keep.stride(), *out.stride(),
            TILE_T=tile_t, TILE_O=tile_o, TILE_G=TILES_G[x.itemsize], PRECISION=dot_precision(),
            num_warps=4, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit
def _few_kernel(
    x_ptr, values_ptr, keep_ptr, partial_ptr, T, O, G, STEPS,  # noqa: E741
    stride_x_t, stride_x_j, stride_x_g, stride_values_o, stride_values_h,
    stride_keep_o, stride_keep_b,
    TILE_T: tl.constexpr, TILE_O: tl.constexpr, TILE_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * TILE_O + tl.arange(0, TILE_O)
    split = tl.program_id(1)
    t = tl.arange(0, TILE_T)
    first = split * STEPS * TILE_G
    total = tl.zeros((TILE_O, TILE_T), tl.float32)
    for start in tl.range(first, tl.minimum(G, first + STEPS * TILE_G), TILE_G):  # pyright: ignore
        w0, w1, w2, w3 = load24(
            values_ptr, keep_ptr, o, O, start, G,
            stride_values_o, stride_values_h, stride_keep_o, stride_keep_b, TILE_O, TILE_G,
        )  # fmt: skip
        g = start + tl.arange(0, TILE_G)
        ptrs = x_ptr + t[None, :].to(tl.int64) * stride_x_t + g[:, None].to(tl.int64) * stride_x_g
        inside = (g < G)[:, None] & (t < T)[None, :]
        x0 = tl.load(ptrs, inside, other=0.0)  # [TILE_G, TILE_T]
        x1 = tl.load(ptrs + stride_x_j, inside, other=0.0)
        x2 = tl.load(ptrs + 2 * stride_x_j, inside, other=0.0)
        x3 = tl.load(ptrs + 3 * stride_x_j, inside, other=0.0)
        total = tl.dot(w0, x0, total, input_precision=PRECISION)
        total = tl.dot(w1, x1, total, input_precision=PRECISION)
        total = tl.dot(w2, x2, total, input_precision=PRECISION)
        total = tl.dot(w3, x3, total, input_precision=PRECISION)
    ptrs = partial_ptr + (split.to(tl.int64) * T + t[None, :]) * O + o[:, None]
    tl.store(ptrs, total, (o < O)[:, None] & (t < T)[None, :])


@triton.jit
def _tiles_kernel(
    x_ptr, values_ptr, keep_ptr, out_ptr, T, O, G,  # noqa: E741
    stride_x_t, stride_x_i, stride_values_o, stride_values_h, stride_keep_o, stride_keep_b,
    stride_out_t, stride_out_o,
    TILE_T: tl.constexpr, TILE_O: tl.constexpr, TILE_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * TILE_O + tl.arange(0, TILE_O)
    t = tl.program_id(1).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    total = tl.zeros((TILE_T, TILE_O), tl.float32)
    for start in tl.range(0, G, TILE_G):  # pyright: ignore
        w0, w1, w2, w3 = load24(
            values_ptr, keep_ptr, o, O, start, G,
            stride_values_o, stride_values_h, stride_keep_o, stride_keep_b, TILE_O, TILE_G,
        )  # fmt: skip
        weight = interleave(w0, w1, w2, w3, TILE_O, TILE_G)  # [TILE_O, 4 * TILE_G]
        i = 4 * start + tl.arange(0, 4 * TILE_G)
        ptrs = x_ptr + t[:, None] * stride_x_t + i[None, :].to(tl.int64) * stride_x_i
        inside = (t < T)[:, None] & (i < 4 * G)[None, :]
        x = tl.load(ptrs, inside, other=0.0)  # [TILE_T, 4 * TILE_G]
        total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)
    ptrs = out_ptr + t[:, None] * stride_out_t + o[None, :] * stride_out_o
    tl.store(ptrs, total.to(out_ptr.dtype.element_ty), (t < T)[:, None] & (o < O)[None, :])
