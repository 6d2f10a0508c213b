"""Triton, or placeholders where it is not installed.

Without it the kernels are defined but never launched.
"""

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
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

__all__ = [
    "architecture",
    "multiprocessors",
    "runs_ptx",
    "runs_triton",
    "tl",
    "triton",
    "version",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
USUAL = 132  # multiprocessors of an H100 or H200, for which kernels are compiled without a GPU


def runs_triton(x: Tensor) -> bool:
    """Return whether Triton kernels run on ``x``: CUDA, or the interpreter."""
    return x.is_cuda or INTERPRETED


def runs_ptx() -> bool:
    """Return whether kernels may contain NVIDIA's assembly."""
    return not (INTERPRETED or torch.version.hip)


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors the device has; the interpreter has one."""
    if INTERPRETED:
        return 1
    if device.type != "cuda":
        return USUAL
    return torch.cuda.get_device_properties(device).multi_processor_count


def architecture() -> int:
    """Return the compute capability for which NVIDIA kernels are compiled, 90 for 9.0."""
    return triton.runtime.driver.active.get_current_target().arch


def version() -> tuple[int, ...]:
    """Return the first two numbers of Triton's version."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2])
