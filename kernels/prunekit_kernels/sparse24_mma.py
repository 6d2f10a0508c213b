"""2:4 product on sparse tensor cores, W in fragment order.

y = x Wᵀ, where the weight streams from memory straight into ``mma.sp``: no expansion, shared memory
or shuffle. One inline assembly block multiplies 256 columns: eight products of 16 rows, 32 columns,
8 tokens.

    up to 16 tokens    a program takes 16 rows, and its warps take turns at their columns
    up to ``reach``    a warp takes 32 rows and 32 tokens
    more               back to row order, expanded to memory, multiplied dense

Source: PTX ISA, mma.sp::ordered_metadata (sm_80 and newer).
Shapes: T tokens, O output features (multiple of 16), I input features (multiple of 256), H = I / 2,
B = I / 8; P groups of 8 tokens.
"""

from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from prunekit_kernels._sparse24_mma_kernels import (
    few_kernel,
    many_kernel,
    order_kernel,
    products,
    reading_products,
)
from prunekit_kernels._triton import multiprocessors, runs_ptx, triton
from prunekit_kernels.fragments24 import TOKENS, from_fragments, has_fragments
from prunekit_kernels.sparse24 import Sparse24, check24, expand24
from prunekit_kernels.sparse24_matmul import (
    FEW,
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
    """Return ``x Wᵀ`` for a W in fragment order, summed in float32.

    Args:
        x: Of the dtype of ``values``; any strides.
        values: Float16 or bfloat16, contiguous, from
            :func:`prunekit_kernels.fragments24.to_fragments`.
        keep: Metadata, likewise.
        reach: With more tokens than this the weight is expanded to memory first; None: 256, the
            default without a measurement.

    Raises:
        ValueError: Shapes, types or devices do not match.
    """
    check24(values, keep)
    if not (values.is_contiguous() and keep.is_contiguous()):
        raise ValueError("values and keep in fragment order must be contiguous")
    check_inputs(x, 2 * values.shape[1], values)
    if not has_fragments(len(values), x.shape[1], x.dtype):
        raise ValueError(
            "fragment order needs 16-bit floats, outputs in multiples of 16 and inputs of 256, "
            f"got {x.dtype}, {len(values)} and {x.shape[1]}"
        )
    return _sparse24_mma(x, values, keep, REACH if reach is None else reach)


def runs_mma(x: Tensor) -> bool:
    """Return whether ``x`` is on an NVIDIA GPU from Ampere on."""
    if not (x.is_cuda and runs_ptx()):
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def sparse24_mma_reference(x: Tensor, values: Tensor, keep: Tensor, reach: int = REACH) -> Tensor:
    """Return the same from row order.

    Args:
        x: [T, I].
        values: [O, H] in fragment order.
        keep: [O, B] in fragment order.
        reach: Most tokens without expanding the weight.
    """
    return _sparse24_matmul(x, *from_fragments(Sparse24(values, keep)), reach)


@torch.library.custom_op("prunekit::sparse24_mma", mutates_args=())
def _sparse24_mma(x: Tensor, values: Tensor, keep: Tensor, reach: int) -> Tensor:
    if not x.numel() or not values.numel() or len(x) > reach or not runs_mma(x):
        return sparse24_mma_reference(x, values, keep, reach)
    return _launch_few(x, values, keep) if len(x) <= FEW else _launch_many(x, values, keep)


@_sparse24_mma.register_fake
def _(x: Tensor, values: Tensor, keep: Tensor, reach: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], values.shape[0])  # len() would fix the number of tokens


@partial(_sparse24_mma.register_autograd, setup_context=remember)
def _(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad @ expand24(*from_fragments(Sparse24(*ctx.saved_tensors))), None, None, None


def _launch_few(x: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    tokens, outputs, chunks = len(x), len(values), x.shape[1] // 256
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    words, tiles = _words(x), outputs // 16
    asm, constraints = reading_products(x.dtype)
    # Where tiles are few, more warps share one, so that as many loads are in flight.
    warps = 8 if tiles < 2 * multiprocessors(x.device) else 4
    with torch.cuda.device_of(x):
        few_kernel[(tiles,)](
            values.view(torch.int32), keep.view(torch.int32), words, out,
            tokens, outputs, chunks, words.stride(0),
            ASM=asm, CONSTRAINTS=constraints, WARPS=warps, STAGES=3, PAIR=tokens > TOKENS,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _launch_many(x: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    tokens, outputs, chunks = len(x), len(values), x.shape[1] // 256
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    asm, constraints = products(x.dtype)
    grid = (triton.cdiv(outputs, 32 * WARPS), triton.cdiv(tokens, 4 * TOKENS))
    with torch.cuda.device_of(x):
        many_kernel[grid](
            values.view(torch.int32), keep.view(torch.int32), in_lane_order(x), out,
            tokens, outputs, chunks,
            ASM=asm, CONSTRAINTS=constraints, WARPS=WARPS,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def in_lane_order(x: Tensor) -> Tensor:
    """Return tokens in fragment order, in one launch.

    The same as :func:`prunekit_kernels.fragments24.token_fragments`.
    """
    words = _words(x)
    tokens, chunks = len(x), x.shape[1] // 256
    groups = triton.cdiv(tokens, TOKENS)
    out = torch.empty(groups, 8 * chunks, 32, 4, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        order_kernel[(chunks, groups)](
            words, out, tokens, chunks, words.stride(0), num_warps=4, enable_fp_fusion=True
        )
    return out


def _words(x: Tensor) -> Tensor:
    """Return tokens as words of two numbers, [T, I / 2] int32.

    It is a copy where the tokens are not laid out so.
    """
    if x.stride(1) != 1 or x.stride(0) % 2 or x.storage_offset() % 2:
        # With one token the stride may be anything.
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.int32)
