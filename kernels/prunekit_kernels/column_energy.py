"""Column energy: e[i] = Σₜ x[t, i]², Wanda's squared input norm.

Source: Sun et al., A Simple and Effective Pruning Approach for LLMs, eq. 1, arXiv:2306.11695.
Shapes: T tokens, I input features.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit_kernels._rows import Rows, arguments, check_rows, taken
from prunekit_kernels._triton import runs_triton, tl, triton

CHUNK = 1 << 20  # entries squared at a time on the CPU, to fit its caches: 7x as fast as one pass
RUN = 512  # tokens summed by one program; fixed: it sets the summation order
TILE_T = 16  # fixed for the same reason
TILE_I = 128


def column_energy(
    x: Float[Tensor, "T I"], out: Float[Tensor, " I"], rows: Rows | None = None
) -> None:
    """Add the energy of each column of ``x`` to ``out``, in place.

    Args:
        x: Inputs of a linear layer; any float type, any strides. Squares are summed in float32:
            inputs below 1e-19 are lost, above 1e19 infinite.
        out: Running sum, float32.
        rows: Only these rows: a mask, or a list of indices, which may repeat.

    Raises:
        ValueError: ``out`` is not float32, on another device, or of another width; or ``rows``
            is neither a mask nor a list.
        RuntimeError: A listed row is out of range.
    """
    if out.dtype != torch.float32 or out.shape != x.shape[1:] or out.device != x.device:
        raise ValueError(
            f"out must be float32 of shape {tuple(x.shape[1:])} on {x.device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    check_rows(rows, x)
    _column_energy(x, out, rows)


def column_energy_reference(x: Float[Tensor, "T I"]) -> Float[Tensor, " I"]:
    """Return the same in plain PyTorch."""
    return x.float().square().sum(0)


@torch.library.custom_op("prunekit::column_energy", mutates_args=("out",))
def _column_energy(x: Tensor, out: Tensor, rows: Tensor | None) -> None:
    if runs_triton(x):
        _launch(x, out, rows)
        return
    for chunk in taken(x, rows).split(max(1, CHUNK // max(1, x.shape[1]))):
        copy = chunk.float()
        # A copy is squared in place: allocating another takes longer than all the rest.
        squares = copy.square() if copy is chunk else copy.square_()
        out += squares.sum(0)


@_column_energy.register_fake
def _(x: Tensor, out: Tensor, rows: Tensor | None) -> None:
    pass


def _launch(x: Tensor, out: Tensor, rows: Tensor | None) -> None:
    inputs = x.shape[1]
    index, stride, tokens, kind = arguments(x, rows)
    runs = triton.cdiv(tokens, RUN)
    partial = torch.empty((runs, inputs), dtype=torch.float32, device=x.device)
    if partial.numel():
        grid = (triton.cdiv(inputs, TILE_I), runs)
        with torch.cuda.device_of(x):
            _kernel[grid](
                x, index, partial, tokens, inputs, *x.stride(), stride, ROWS=kind,
                RUN=RUN, TILE_T=TILE_T, TILE_I=TILE_I, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
            _add_kernel[(triton.cdiv(inputs, TILE_I),)](
                partial, out, inputs, runs, out.stride(0), TILE_I=TILE_I, num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip


@triton.jit
def _kernel(
    x_ptr, rows_ptr, partial_ptr, T, I, stride_x_t, stride_x_i, stride_rows,  # noqa: E741
    ROWS: tl.constexpr, RUN: tl.constexpr, TILE_T: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
    run = tl.program_id(1).to(tl.int64)
    total = tl.zeros((TILE_T, TILE_I), tl.float32)
    for start in tl.range(0, RUN, TILE_T, num_stages=4):  # pyright: ignore
        t = run * RUN + start + tl.arange(0, TILE_T)
        inside_t = t < T
        if ROWS == 1:
            t = tl.load(rows_ptr + t * stride_rows, inside_t, other=0).to(tl.int64)
        if ROWS == 2:
            inside_t = inside_t & (tl.load(rows_ptr + t * stride_rows, inside_t, other=0) != 0)
        inside = inside_t[:, None] & (i[None, :] < I)
        ptrs = x_ptr + t[:, None] * stride_x_t + i[None, :] * stride_x_i
        x = tl.load(ptrs, inside, other=0.0).to(tl.float32)  # [TILE_T, TILE_I]
        total += x * x
    tl.store(partial_ptr + run * I + i, tl.sum(total, 0), i < I)


@triton.jit
def _add_kernel(partial_ptr, out_ptr, I, RUNS, stride_out, TILE_I: tl.constexpr):  # noqa: E741
    # In the order of the runs.
    i = tl.program_id(0).to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
    total = tl.zeros((TILE_I,), tl.float32)
    for _ in tl.range(0, RUNS, num_stages=4):  # pyright: ignore
        total += tl.load(partial_ptr + i, i < I, other=0.0)
        partial_ptr += I
    ptrs = out_ptr + i * stride_out
    tl.store(ptrs, tl.load(ptrs, i < I, other=0.0) + total, i < I)
