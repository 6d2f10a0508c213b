"""Gram matrix: G = XᵀX, all that the squared error of a linear layer depends on.

And the cross product XᵀY of what else there is of a layer's inputs, like how the pruned model's
differ from the dense one's, by which a pruned layer can aim at the dense one's output.

Source: Frantar & Alistarh, SparseGPT, §3, arXiv:2301.00774 (without its factor 2, which cancels).
Shapes: T tokens, I and J input features. Only G's lower triangle is computed: half the work, which
is why cuBLAS, that computes all of it, is not used; the cross product runs in the same kernel, as
it adds products of bfloat16 to a float32 sum in place.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit_kernels._precision import dot_precision, full_precision
from prunekit_kernels._rows import LISTED, Rows, arguments, check_rows, taken
from prunekit_kernels._triton import runs_triton, tl, triton

PANEL = 192  # columns at a time on the CPU: near the fastest of 96..576 at I = 288 to 1536
CHUNK = 2048  # tokens at a time on the CPU, so that casting to float32 copies little
# Tokens of one launch. Tensor cores cut off what they add instead of rounding it: 256 additions, of
# 16 tokens each, lose up to 256 · 2⁻²³. What launches give is added in float32. A sum of every tile
# in float32 would take twice the registers. Fixed, since it sets the order of summation.
RUN = 4096


def gram(x: Float[Tensor, "T I"], out: Float[Tensor, "I I"], rows: Rows | None = None) -> None:
    """Add the lower triangle of ``xᵀx``, diagonal included, to that of ``out``, in place.

    Entries above the diagonal of ``out`` are unspecified; :func:`mirror` fills them.

    Args:
        x: Inputs of a linear layer; any float type, any strides. Products are summed in float32,
            on NVIDIA GPUs each as three TF32 products (22 bits); those of float16 and bfloat16 are
            exact. Squares have to fit float32: below 1e-19 they are lost, above 1e19 infinite.
        out: Running sum, float32.
        rows: Only these count: a mask, or a list in which one may occur more than once.

    Raises:
        ValueError: ``out`` is not float32, on another device, or of another size; or ``rows`` are
            neither.
        RuntimeError: A listed row is not one of x.
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

    As exact as :func:`gram`, but on a CPU with bfloat16: there products are exact and summed in
    float32, but what each 2048 tokens sum up to is rounded to bfloat16, for half the time. Where
    that is too much, give it float32.

    Args:
        x: Something of each token.
        y: Something else of the same tokens, of the same type.
        out: Running sum, float32.
        rows: Only these count, as in :func:`gram`.

    Raises:
        ValueError: Shapes, types or devices do not fit.
        RuntimeError: A listed row is not one of x.
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
    """Say the same, both triangles, in plain PyTorch; the kernel is tested against it."""
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
    listed, stride, tokens, kind = arguments(x, rows)
    # Narrow layers get smaller tiles, or most of the GPU would idle; not a reduction tile.
    tile = 128 if inputs > 2048 else 64
    tiles = triton.cdiv(inputs, tile)
    across = triton.cdiv(outputs, tile)
    grid = (tiles * (tiles + 1) // 2 if y is None else tiles * across,)
    wide = left.dtype == torch.float32
    for start in range(0, tokens if out.numel() else 0, RUN):
        run = slice(start, min(start + RUN, tokens))
        # A list of rows is of rows anywhere.
        parts = (left, right) if kind == LISTED else (left[run], right[run])
        with torch.cuda.device_of(x):
            _kernel[grid](
                *parts, listed[run], out, run.stop - start, inputs, outputs, *left.stride(),
                *right.stride(), stride, *out.stride(), across, SYMMETRIC=y is None, ROWS=kind,
                TILE_I=tile, TILE_T=32 if wide else 64, PRECISION=dot_precision(),
                num_warps=8 if tile == 128 else 4, num_stages=2 if wide else 3,
                enable_fp_fusion=True,
            )  # fmt: skip


def _narrow(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x.float()


@triton.jit
def _kernel(  # noqa: PLR0915  its branches are decided when it is compiled
    x_ptr, y_ptr, rows_ptr, out_ptr, T, I, J, x_t, x_i, y_t, y_i,  # noqa: E741
    stride_listed, stride_row, stride_column, across,
    SYMMETRIC: tl.constexpr, ROWS: tl.constexpr,
    TILE_I: tl.constexpr, TILE_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if SYMMETRIC:
        # Programs count the tiles of the lower triangle row by row; undo pid = r(r+1)/2 + c.
        r = ((tl.sqrt(8.0 * pid.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        r = tl.where((r + 1) * (r + 2) // 2 <= pid, r + 1, r)
        r = tl.where(r * (r + 1) // 2 > pid, r - 1, r)
        c = pid - r * (r + 1) // 2
    else:
        r = pid // across
        c = pid % across
    row = r.to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
    column = c.to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
    t = tl.arange(0, TILE_T).to(tl.int64)
    left_ptr = x_ptr + row[None, :] * x_i
    right_ptr = y_ptr + column[None, :] * y_i
    if ROWS != 1:
        left_ptr += t[:, None] * x_t
        right_ptr += t[:, None] * y_t
    total = tl.zeros((TILE_I, TILE_I), tl.float32)
    for start in range(0, T, TILE_T):
        counts = t < T - start
        if ROWS == 1:
            at = tl.load(rows_ptr + (start + t) * stride_listed, counts, other=0)
            at = at.to(tl.int64)[:, None]
            left_spot = left_ptr + at * x_t
            right_spot = right_ptr + at * y_t
        else:
            left_spot = left_ptr
            right_spot = right_ptr
            left_ptr += tl.cast(x_t, tl.int64) * TILE_T
            right_ptr += tl.cast(y_t, tl.int64) * TILE_T
        if ROWS == 2:
            spot = rows_ptr + (start + t) * stride_listed
            counts = counts & (tl.load(spot, counts, other=0) != 0)
        inside = counts[:, None]
        left = tl.load(left_spot, inside & (row < I)[None, :], other=0.0)  # [TILE_T, TILE_I]
        right = tl.load(right_spot, inside & (column < J)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    spot = out_ptr + row[:, None] * stride_row + column[None, :] * stride_column
    inside = (row < I)[:, None] & (column < J)[None, :]
    if SYMMETRIC:
        inside = inside & (row[:, None] >= column[None, :])
    tl.store(spot, tl.load(spot, inside, other=0.0) + total, inside)
