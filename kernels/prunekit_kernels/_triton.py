"""Triton, or placeholders where it is not installed.

Without it the kernels are defined but never launched.
"""

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl

    triton: Any  # launch options are not parameters of the kernel
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
    """Return whether Triton kernels run on ``x``: CUDA, or the interpreter."""
    return x.is_cuda or INTERPRETED
