"""Devices that a config can name, and the dtypes in which they compute.

torch is imported inside functions: a config is checked without it.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from prunekit.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from prunekit.checkpoint.reader import Checkpoint

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
"""Names of devices in a config."""


def now(device: torch.device) -> float:
    """Return seconds of a clock that only goes on, after waiting for the device."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_of(name: str) -> torch.device:
    """Return the device that a config's ``device`` means.

    Raises:
        ConfigError: It is none, or a GPU that is not here.
    """
    import torch

    if not DEVICE.fullmatch(name):
        raise ConfigError(f'device: "{name}" is not one. Choose: auto, cpu, cuda, cuda:0.')
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name if name != "auto" else "cuda" if gpus else "cpu")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(
            f'device: "{name}" is not here: PyTorch sees {gpus} GPUs. Choose auto or cpu; to plan '
            "for another machine: prunekit plan with --device-memory."
        )
    return device


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type in which blocks run: as stored where the device multiplies it, or float32.

    A CPU takes half as long for bfloat16 if it has units for it, and longer if it has none.
    """
    import torch

    if device.type != "cpu" or (stored == torch.bfloat16 and _multiplies_bfloat16()):
        return stored
    return torch.float32


def measuring_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type in which a loss is measured: on a CPU always float32.

    What bfloat16 rounds off can be more than what a head is worth, and every CPU says the same.
    """
    import torch

    return torch.float32 if device.type == "cpu" else stored


def _multiplies_bfloat16() -> bool:
    """Say whether this CPU does so natively; on x86 each one with AMX has AVX512-BF16 too."""
    import torch

    return torch.cpu._is_avx512_bf16_supported()


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the floating type that most bytes of a checkpoint are in."""
    sizes: dict[torch.dtype, int] = {}
    for entry in checkpoint.entries.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])
