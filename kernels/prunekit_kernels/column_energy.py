"""Column energy: e[i] = Σₜ x[t, i]², the squared input norm Wanda needs.

Source: Sun et al., A Simple and Effective Pruning Approach for LLMs, eq. 1, arXiv:2306.11695.
Shapes: T tokens, I input features, S runs of tokens.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit_kernels._triton import runs_triton, tl, triton

CHUNK = 512  # tokens squared at a time on the CPU, whose caches then hold them: 2x one pass
RUN = 512  # tokens summed by one program; fixed, since it sets the order of summation
TILE_T = 16  # fixed for the same reason
TILE_I = 128


def column_energy(x: Float[Tensor, "T I"], out: Float[Tensor, " I"]) -> None:
    """Add the energy of each column of ``x`` to ``out``, in place.

    Args:
        x: Inputs of a linear layer; any float type, any strides. Summed in float32.
        out: Running sum, float32.

    Raises:
        ValueError: ``out`` is not float32, on another device, or of another width.
    """
    if out.dtype != torch.float32 or out.shape != x.shape[1:] or out.device != x.device:
        raise ValueError(
            f"out must be float32 of shape {tuple(x.shape[1:])} on {x.device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    _column_energy(x, out)


def column_energy_reference(x: Float[Tensor, "T I"]) -> Float[Tensor, " I"]:
    """Say the same in plain PyTorch; the definition the kernel is tested against."""
    return x.float().square().sum(0)


@torch.library.custom_op("prunekit::column_energy", mutates_args=("out",))
def _column_energy(x: Tensor, out: Tensor) -> None:
    if runs_triton(x):
        _launch(x, out)
        return
    for rows in x.split(CHUNK):
        out += column_energy_reference(rows)


@_column_energy.register_fake
def _(x: Tensor, out: Tensor) -> None:
    pass


def _launch(x: Tensor, out: Tensor) -> None:
    tokens, inputs = x.shape
    runs = triton.cdiv(tokens, RUN)
    partial = torch.empty((runs, inputs), dtype=torch.float32, device=x.device)
    if partial.numel():
        grid = (triton.cdiv(inputs, TILE_I), runs)
        with torch.cuda.device_of(x):
            _kernel[grid](
                x, partial, tokens, inputs, *x.stride(),
                RUN=RUN, TILE_T=TILE_T, TILE_I=TILE_I, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    out += partial.sum(0)


@triton.jit
def _kernel(
    x_ptr, partial_ptr, T, I, stride_t, stride_i,  # noqa: E741
    RUN: tl.constexpr, TILE_T: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
    run = tl.program_id(1).to(tl.int64)
    total = tl.zeros((TILE_T, TILE_I), tl.float32)
    for start in tl.range(0, RUN, TILE_T, num_stages=4):  # pyright: ignore
        t = run * RUN + start + tl.arange(0, TILE_T)
        inside = (t[:, None] < T) & (i[None, :] < I)
        x = tl.load(x_ptr + t[:, None] * stride_t + i[None, :] * stride_i, inside, other=0.0)
        x = x.to(tl.float32)  # [TILE_T, TILE_I]
        total += x * x
    tl.store(partial_ptr + run * I + i, tl.sum(total, 0), i < I)
