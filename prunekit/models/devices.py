"""Devices named in a config, and their compute dtypes.

torch is imported inside functions because configs are checked without it.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from prunekit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

    from prunekit.checkpoint.reader import Checkpoint

DEVICE_PATTERN = re.compile(r"auto|cpu|cuda(:\d+)?")
"""Valid values of ``device`` in a config."""


def synchronized_seconds(device: torch.device) -> float:
    """Return a monotonic clock in seconds after synchronizing the device."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def resolve_device(name: str) -> torch.device:
    """Return the torch device for ``device`` in a config.

    Raises:
        ConfigError: The name is not valid, or names a GPU that PyTorch does not see.
    """
    import torch

    if not DEVICE_PATTERN.fullmatch(name):
        raise ConfigError(f'device: "{name}" is not a device. Choose: auto, cpu, cuda, cuda:0.')
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name if name != "auto" else "cuda" if gpus else "cpu")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(
            f'device: "{name}" is not available: PyTorch sees {gpus} GPUs. Choose auto or cpu; to '
            "plan for another machine: prunekit plan with --device-memory."
        )
    return device


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which blocks run: the stored dtype or float32.

    GPUs use the stored dtype. A CPU with native bfloat16 takes half as long in bfloat16 as in
    float32; without it, bfloat16 is slower.
    """
    import torch

    if device.type != "cpu" or (stored == torch.bfloat16 and _multiplies_bfloat16()):
        return stored
    return torch.float32


def loss_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which losses are measured: float32 on a CPU.

    Rounding to bfloat16 can exceed the effect of removing one head, and with float32 all CPUs give
    the same result.
    """
    import torch

    return torch.float32 if device.type == "cpu" else stored


def _multiplies_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 natively.

    On x86, every CPU with AMX also has AVX512-BF16.
    """
    import torch

    return torch.cpu._is_avx512_bf16_supported()


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the floating-point dtype of most bytes in a checkpoint.

    Raises:
        CheckpointError: No tensor has a dtype that can be computed with.
    """
    from prunekit.checkpoint.header import FLOAT_DTYPES

    sizes: dict[torch.dtype, int] = {}
    for entry in checkpoint.entries.values():
        if entry.dtype in FLOAT_DTYPES:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    if not sizes:
        raise CheckpointError(
            f"{checkpoint.folder}: holds no weight in float64, float32, float16 or bfloat16."
        )
    return max(sizes, key=lambda dtype: sizes[dtype])
