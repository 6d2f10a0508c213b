"""Gram matrix: G = XᵀX, which determines a linear layer's squared error.

Also the cross product XᵀY with another statistic of the same tokens, such as the difference between
the inputs of the pruned and the dense model, so that a pruned layer can target the dense output.

Source: Frantar & Alistarh, SparseGPT, §3, arXiv:2301.00774 (without its factor 2, which cancels).
Shapes: T tokens, I and J input features. Only the lower triangle of G is computed, half the work of
cuBLAS. The cross product uses the same kernel, since it adds bfloat16 products to a float32 sum in
place.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit_kernels._precision import dot_precision, full_precision
from prunekit_kernels._rows import LISTED, Rows, arguments, check_rows, taken
from prunekit_kernels._triton import runs_triton, tl, triton

PANEL = 192  # columns at a time on the CPU: near the fastest of 96..576 at I = 288 to 1536
CHUNK = 2048  # tokens at a time on the CPU, so that casting to float32 copies little
# Tokens of one launch. Tensor cores truncate sums instead of rounding them: 256 additions of 16
# tokens each lose up to 256 · 2⁻²³. Launches are added up in float32. Adding up every tile in
# float32 would take twice the registers. Fixed: it sets the summation order.
RUN = 4096


def gram(x: Float[Tensor, "T I"], out: Float[Tensor, "I I"], rows: Rows | None = None) -> None:
    """Add the lower triangle of ``xᵀx`` to that of ``out``, in place.

    The diagonal is included. Entries above the diagonal of ``out`` are unspecified; :func:`mirror`
    fills them.

    Args:
        x: Inputs of a linear layer; any float type, any strides. Products are summed in float32, on
            NVIDIA GPUs each as three TF32 products (22 bits); those of float16 and bfloat16 are
            exact. Squares must fit float32: inputs below 1e-19 are lost, above 1e19 infinite.
        out: Running sum, float32.
        rows: Only these rows: a mask, or a list of indices, which may repeat.

    Raises:
        ValueError: ``out`` is not float32, on another device, or of another size; or ``rows`` is
            neither a mask nor a list.
        RuntimeError: A listed row is out of range.
    """
    _check(out, x, x)
    check_rows(rows, x)
    _gram(x, None, out, rows)


def cross_gram(
    x: Float[Tensor, "T I"],
    y: Float[Tensor, "T J"],
    out: Float[Tensor, "I J"],
    rows: Rows | None = None,
) -> None:
    """Add ``xᵀy`` to ``out``, in place.

    As exact as :func:`gram`, except for bfloat16 on a CPU: products are exact and summed in
    float32, but the sum of every 2048 tokens is rounded to bfloat16, which takes half the time.
    Pass float32 where that error is too large.

    Args:
        x: A feature vector of each token.
        y: Another one of the same tokens, of the same dtype.
        out: Running sum, float32.
        rows: Only these rows, as in :func:`gram`.

    Raises:
        ValueError: Shapes, types or devices do not match.
        RuntimeError: A listed row is out of range.
    """
    if len(y) != len(x) or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"y must be {x.dtype} of {len(x)} tokens on {x.device}, "
            f"got {y.dtype} of {len(y)} on {y.device}"
        )
    _check(out, x, y)
    check_rows(rows, x)
    _gram(x, y, out, rows)


def mirror(out: Float[Tensor, "I I"]) -> Float[Tensor, "I I"]:
    """Copy the lower triangle onto the upper, in place, and return ``out``."""
    for start in range(0, len(out), PANEL):
        end = start + PANEL
        out[:start, start:end] = out[start:end, :start].T
        square = out[start:end, start:end]
        square.copy_(square.tril() + square.tril(-1).T)
    return out


def gram_reference(x: Float[Tensor, "T I"]) -> Float[Tensor, "I I"]:
    """Return the same, both triangles, in plain PyTorch."""
    with full_precision():
        return x.float().T @ x.float()


def _check(out: Tensor, x: Tensor, y: Tensor) -> None:
    size = (x.shape[1], y.shape[1])
    if out.dtype != torch.float32 or out.shape != size or out.device != x.device:
        raise ValueError(
            f"out must be float32 of shape {size} on {x.device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )


@torch.library.custom_op("prunekit::gram", mutates_args=("out",))
def _gram(x: Tensor, y: Tensor | None, out: Tensor, rows: Tensor | None) -> None:
    if runs_triton(x):
        _launch(x, y, out, rows)
        return
    with full_precision():
        if y is None:
            _panels(taken(x, rows), out)
            return
        for left, right in zip(*(taken(z, rows).split(CHUNK) for z in (x, y)), strict=True):
            if x.dtype == torch.bfloat16:
                out += left.T @ right
            else:
                out.addmm_(left.float().T, right.float())


@_gram.register_fake
def _(x: Tensor, y: Tensor | None, out: Tensor, rows: Tensor | None) -> None:
    pass


def _panels(x: Tensor, out: Tensor) -> None:
    for chunk in x.split(CHUNK):
        rows = chunk.float()
        for start in range(0, x.shape[1], PANEL):
            panel = slice(start, start + PANEL)
            out[start:, panel].addmm_(rows[:, start:].T, rows[:, panel])


def _launch(x: Tensor, y: Tensor | None, out: Tensor, rows: Tensor | None) -> None:
    left, right = _narrow(x), _narrow(x if y is None else y)
    inputs, outputs = left.shape[1], right.shape[1]
    index, stride, tokens, kind = arguments(x, rows)
    # Narrow layers get smaller output tiles, or most of the GPU would idle.
    tile = 128 if inputs > 2048 else 64
    tiles = triton.cdiv(inputs, tile)
    across = triton.cdiv(outputs, tile)
    grid = (tiles * (tiles + 1) // 2 if y is None else tiles * across,)
    wide = left.dtype == torch.float32
    for start in range(0, tokens if out.numel() else 0, RUN):
        run = slice(start, min(start + RUN, tokens))
        # Listed rows may be anywhere in x.
        parts = (left, right) if kind == LISTED else (left[run], right[run])
        with torch.cuda.device_of(x):
            _kernel[grid](
                *parts, index[run], out, run.stop - start, inputs, outputs, *left.stride(),
                *right.stride(), stride, *out.stride(), across, SYMMETRIC=y is None, ROWS=kind,
                TILE_I=tile, TILE_T=32 if wide else 64, PRECISION=dot_precision(),
                num_warps=8 if tile == 128 else 4, num_stages=2 if wide else 3,
                enable_fp_fusion=True,
            )  # fmt: skip


def _narrow(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x.float()


@triton.jit
def _kernel(  # noqa: PLR0915  branches are resolved at compile time
    x_ptr, y_ptr, rows_ptr, out_ptr, T, I, J,  # noqa: E741
    stride_x_t, stride_x_i, stride_y_t, stride_y_j, stride_rows, stride_out_i, stride_out_j, ACROSS,
    SYMMETRIC: tl.constexpr, ROWS: tl.constexpr,
    TILE_I: tl.constexpr, TILE_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if SYMMETRIC:
        # Programs number the tiles of the lower triangle row by row: invert pid = r(r+1)/2 + c.
        r = ((tl.sqrt(8.0 * pid.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        r = tl.where((r + 1) * (r + 2) // 2 <= pid, r + 1, r)
        r = tl.where(r * (r + 1) // 2 > pid, r - 1, r)
        c = pid - r * (r + 1) // 2
    else:
        r = pid // ACROSS
        c = pid % ACROSS
    i = r.to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
    j = c.to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
    t = tl.arange(0, TILE_T).to(tl.int64)
    left_start = x_ptr + i[None, :] * stride_x_i
    right_start = y_ptr + j[None, :] * stride_y_j
    if ROWS != 1:
        left_start += t[:, None] * stride_x_t
        right_start += t[:, None] * stride_y_t
    total = tl.zeros((TILE_I, TILE_I), tl.float32)
    for start in range(0, T, TILE_T):
        inside_t = t < T - start
        if ROWS == 1:
            listed = tl.load(rows_ptr + (start + t) * stride_rows, inside_t, other=0)
            listed = listed.to(tl.int64)[:, None]
            left_ptrs = left_start + listed * stride_x_t
            right_ptrs = right_start + listed * stride_y_t
        else:
            left_ptrs = left_start
            right_ptrs = right_start
            left_start += tl.cast(stride_x_t, tl.int64) * TILE_T
            right_start += tl.cast(stride_y_t, tl.int64) * TILE_T
        if ROWS == 2:
            ptrs = rows_ptr + (start + t) * stride_rows
            inside_t = inside_t & (tl.load(ptrs, inside_t, other=0) != 0)
        inside = inside_t[:, None]
        left = tl.load(left_ptrs, inside & (i < I)[None, :], other=0.0)  # [TILE_T, TILE_I]
        right = tl.load(right_ptrs, inside & (j < J)[None, :], other=0.0)  # [TILE_T, TILE_I]
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    ptrs = out_ptr + i[:, None] * stride_out_i + j[None, :] * stride_out_j
    inside = (i < I)[:, None] & (j < J)[None, :]
    if SYMMETRIC:
        inside = inside & (i[:, None] >= j[None, :])
    tl.store(ptrs, tl.load(ptrs, inside, other=0.0) + total, inside)
