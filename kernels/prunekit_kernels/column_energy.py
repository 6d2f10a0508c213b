"""Column energy: e[i] = Σₜ x[t, i]², the squared input norm Wanda needs.

Source: Sun et al., A Simple and Effective Pruning Approach for LLMs, eq. 1, arXiv:2306.11695.
Shapes: T tokens, I input features, S runs of tokens.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit_kernels._rows import Rows, arguments, check_rows, taken
from prunekit_kernels._triton import runs_triton, tl, triton

CHUNK = 1 << 20  # entries squared at a time on the CPU, whose caches then hold them: 7x one pass
RUN = 512  # tokens summed by one program; fixed, since it sets the order of summation
TILE_T = 16  # fixed for the same reason
TILE_I = 128


def column_energy(
    x: Float[Tensor, "T I"], out: Float[Tensor, " I"], rows: Rows | None = None
) -> None:
    """Add the energy of each column of ``x`` to ``out``, in place.

    Args:
        x: Inputs of a linear layer; any float type, any strides. Summed in float32, which squares
            have to fit: below 1e-19 they are lost, above 1e19 infinite.
        out: Running sum, float32.
        rows: Only these count: a mask, or a list in which one may occur more than once.

    Raises:
        ValueError: ``out`` is not float32, on another device, or of another width; or ``rows``
            are neither.
        RuntimeError: A listed row is not one of x.
    """
    if out.dtype != torch.float32 or out.shape != x.shape[1:] or out.device != x.device:
        raise ValueError(
            f"out must be float32 of shape {tuple(x.shape[1:])} on {x.device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    check_rows(rows, x)
    _column_energy(x, out, rows)


def column_energy_reference(x: Float[Tensor, "T I"]) -> Float[Tensor, " I"]:
    """Say the same in plain PyTorch; the definition the kernel is tested against."""
    return x.float().square().sum(0)


@torch.library.custom_op("prunekit::column_energy", mutates_args=("out",))
def _column_energy(x: Tensor, out: Tensor, rows: Tensor | None) -> None:
    if runs_triton(x):
        _launch(x, out, rows)
        return
    for chunk in taken(x, rows).split(max(1, CHUNK // max(1, x.shape[1]))):
        copy = chunk.float()
        # A copy is squared where it lies: room for another takes longer than all the rest.
        squares = copy.square() if copy is chunk else copy.square_()
        out += squares.sum(0)


@_column_energy.register_fake
def _(x: Tensor, out: Tensor, rows: Tensor | None) -> None:
    pass


def _launch(x: Tensor, out: Tensor, rows: Tensor | None) -> None:
    inputs = x.shape[1]
    listed, stride, tokens, kind = arguments(x, rows)
    runs = triton.cdiv(tokens, RUN)
    partial = torch.empty((runs, inputs), dtype=torch.float32, device=x.device)
    if partial.numel():
        grid = (triton.cdiv(inputs, TILE_I), runs)
        with torch.cuda.device_of(x):
            _kernel[grid](
                x, listed, partial, tokens, inputs, *x.stride(), stride, ROWS=kind,
                RUN=RUN, TILE_T=TILE_T, TILE_I=TILE_I, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    out += partial.sum(0)


@triton.jit
def _kernel(
    x_ptr, rows_ptr, partial_ptr, T, I, stride_t, stride_i, stride_row,  # noqa: E741
    ROWS: tl.constexpr, RUN: tl.constexpr, TILE_T: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
    run = tl.program_id(1).to(tl.int64)
    total = tl.zeros((TILE_T, TILE_I), tl.float32)
    for start in tl.range(0, RUN, TILE_T, num_stages=4):  # pyright: ignore
        t = run * RUN + start + tl.arange(0, TILE_T)
        counts = t < T
        if ROWS == 1:
            t = tl.load(rows_ptr + t * stride_row, counts, other=0).to(tl.int64)
        if ROWS == 2:
            counts = counts & (tl.load(rows_ptr + t * stride_row, counts, other=0) != 0)
        inside = counts[:, None] & (i[None, :] < I)
        x = tl.load(x_ptr + t[:, None] * stride_t + i[None, :] * stride_i, inside, other=0.0)
        x = x.to(tl.float32)  # [TILE_T, TILE_I]
        total += x * x
    tl.store(partial_ptr + run * I + i, tl.sum(total, 0), i < I)
