"""Triton where it is installed; elsewhere the kernels are defined, never launched."""

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl

    triton: Any  # launch options are no parameters of the kernel
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = SimpleNamespace(jit=lambda kernel: kernel)
        tl = SimpleNamespace(constexpr=object)

__all__ = ["runs_triton", "tl", "triton"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(x: Tensor) -> bool:
    """Say whether a Triton kernel works on ``x``: on CUDA, or anywhere in the interpreter."""
    return x.is_cuda or INTERPRETED
