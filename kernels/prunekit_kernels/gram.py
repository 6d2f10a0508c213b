"""Gram matrix: G = XᵀX, all that the squared error of a linear layer depends on.

Source: Frantar & Alistarh, SparseGPT, §3, arXiv:2301.00774 (without its factor 2, which cancels).
Shapes: T tokens, I input features. Only the lower triangle is computed: half the work.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit_kernels._precision import full_precision
from prunekit_kernels._triton import runs_triton, tl, triton

PANEL = 384  # columns at a time on the CPU: fastest of 128..2048 at I = 576, 1536, 4096
CHUNK = 2048  # tokens at a time on the CPU, so that casting to float32 copies little


def gram(x: Float[Tensor, "T I"], out: Float[Tensor, "I I"]) -> None:
    """Add the lower triangle of ``xᵀx``, diagonal included, to that of ``out``, in place.

    Entries above the diagonal of ``out`` are unspecified; :func:`mirror` fills them.

    Args:
        x: Inputs of a linear layer; any float type, any strides. Products are summed in float32,
            without TF32; those of float16 and bfloat16 are exact.
        out: Running sum, float32.

    Raises:
        ValueError: ``out`` is not float32, on another device, or of another size.
    """
    size = (x.shape[1], x.shape[1])
    if out.dtype != torch.float32 or out.shape != size or out.device != x.device:
        raise ValueError(
            f"out must be float32 of shape {size} on {x.device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    _gram(x, out)


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


@torch.library.custom_op("prunekit::gram", mutates_args=("out",))
def _gram(x: Tensor, out: Tensor) -> None:
    if runs_triton(x):
        _launch(x, out)
    else:
        with full_precision():
            _panels(x, out)


@_gram.register_fake
def _(x: Tensor, out: Tensor) -> None:
    pass


def _panels(x: Tensor, out: Tensor) -> None:
    for chunk in x.split(CHUNK):
        rows = chunk.float()
        for start in range(0, x.shape[1], PANEL):
            panel = slice(start, start + PANEL)
            out[start:, panel].addmm_(rows[:, start:].T, rows[:, panel])


def _launch(x: Tensor, out: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        x = x.float()
    tokens, inputs = x.shape
    # Narrow layers get smaller tiles, or most of the GPU would idle; not a reduction tile.
    tile = 128 if inputs > 2048 else 64
    tiles = triton.cdiv(inputs, tile)
    grid = (tiles * (tiles + 1) // 2,)
    if x.numel():
        with torch.cuda.device_of(x):
            _kernel[grid](
                x, out, tokens, inputs, *x.stride(), *out.stride(),
                TILE_I=tile, TILE_T=32 if x.dtype == torch.float32 else 64, PRECISION=_precision(),
                num_warps=8 if tile == 128 else 4, num_stages=2 if x.dtype == torch.float32 else 3,
                enable_fp_fusion=True,
            )  # fmt: skip


def _precision() -> str:
    """How float32 is multiplied; float16 and bfloat16 need no choice.

    Three TF32 products carry 22 bits, close to float32's 24, and run on tensor cores; plain
    float32 ("ieee") would run on the few general units. AMD has no such TF32.
    """
    return "ieee" if torch.version.hip else "tf32x3"


@triton.jit
def _kernel(
    x_ptr, out_ptr, T, I, stride_t, stride_i, stride_row, stride_column,  # noqa: E741
    TILE_I: tl.constexpr, TILE_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Programs count the tiles of the lower triangle row by row; undo pid = r(r+1)/2 + c.
    pid = tl.program_id(0)
    r = ((tl.sqrt(8.0 * pid.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    r = tl.where((r + 1) * (r + 2) // 2 <= pid, r + 1, r)
    r = tl.where(r * (r + 1) // 2 > pid, r - 1, r)
    c = pid - r * (r + 1) // 2
    row = r.to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
    column = c.to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
    t = tl.arange(0, TILE_T).to(tl.int64)
    left_ptr = x_ptr + t[:, None] * stride_t + row[None, :] * stride_i
    right_ptr = x_ptr + t[:, None] * stride_t + column[None, :] * stride_i
    total = tl.zeros((TILE_I, TILE_I), tl.float32)
    for start in range(0, T, TILE_T):
        inside = (t < T - start)[:, None]
        left = tl.load(left_ptr, inside & (row < I)[None, :], other=0.0)  # [TILE_T, TILE_I]
        right = tl.load(right_ptr, inside & (column < I)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
        left_ptr += TILE_T * stride_t
        right_ptr += TILE_T * stride_t
    spot = out_ptr + row[:, None] * stride_row + column[None, :] * stride_column
    inside = (row < I)[:, None] & (row[:, None] >= column[None, :])
    tl.store(spot, tl.load(spot, inside, other=0.0) + total, inside)
