"""The time, once a device has done what it was given."""

import time

import torch


def now(device: torch.device) -> float:
    """Return seconds of a clock that only goes on, after waiting for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
