"""How much memory is free, and what places a model that is larger than one device."""

import os
from typing import Any

import psutil
import torch

MARGIN = 1.15
"""What an estimate may be short of: it holds to 15 %."""


def neighbours() -> int:
    """Return how many processes that share a run are on this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_host() -> int:
    """Return the bytes of main memory that are free, of which each process has its share."""
    return psutil.virtual_memory().available // neighbours()


def free(device: torch.device) -> int:
    """Return the bytes that are free where blocks run."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host()


def spread(nbytes: int, device: torch.device, offload: str) -> dict[str, Any]:
    """Return what ``from_pretrained`` is told so that a whole model has room.

    Nothing where it fits the device. Otherwise accelerate infers a device map: over all visible
    GPUs where the device is one, then main memory, then files, from which each part is fetched when
    it is its turn (``infer_auto_device_map`` and ``dispatch_model``).

    Args:
        nbytes: Of the model's weights, as they will be in memory.
        device: Where it is to run.
        offload: A folder for what goes to files.
    """
    if nbytes * MARGIN <= free(device):
        return {}
    room: dict[int | str, int] = {"cpu": int(free_host() / MARGIN)}
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count()) if device.index is None else [device.index]
        room |= {gpu: int(free(torch.device("cuda", gpu)) / MARGIN) for gpu in gpus}
    return {"device_map": "auto", "max_memory": room, "offload_folder": offload}
