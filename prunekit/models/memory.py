"""Free memory, usable processors, and device maps of accelerate."""

import ctypes
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import psutil
import torch

from prunekit.errors import CapacityError, is_out_of_memory
from prunekit.models import cgroups

ESTIMATE_MARGIN = 1.15
"""Safety factor on memory estimates, which are accurate to 15 %."""
ADVICE = "Free some memory or take a machine with more, then try again."


def local_processes() -> int:
    """Return the number of ranks on this machine, including this one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_host_bytes() -> int:
    """Return the free main memory in bytes per rank on this machine.

    The control group of a container or a scheduler's job may have less than the machine.
    """
    free = min(psutil.virtual_memory().available, *cgroups.free_memory(), sys.maxsize)
    return free // local_processes()


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of the device, or of the host."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()


def device_map_options(
    nbytes: int, device: torch.device, offload: str, limit: float = math.inf
) -> dict[str, Any]:
    """Return ``from_pretrained`` options that fit a whole model into memory.

    The result is empty if the model fits on the device. Otherwise accelerate infers a device map
    over all visible GPUs (or the one named), then main memory, then files, and fetches each part
    when it runs (``infer_auto_device_map`` and ``dispatch_model``).

    Args:
        nbytes: Bytes of the model's weights in memory.
        device: Device to run on.
        offload: Folder for weights that are offloaded to files.
        limit: Bytes of each memory that are used at most, even if more are free.
    """
    if nbytes * ESTIMATE_MARGIN <= min(free_bytes(device), limit):
        return {}

    def budget(free: int) -> int:
        return int(min(free, limit) / ESTIMATE_MARGIN)

    budgets: dict[int | str, int] = {"cpu": budget(free_host_bytes())}
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count()) if device.index is None else [device.index]
        budgets |= {gpu: budget(free_bytes(torch.device("cuda", gpu))) for gpu in gpus}
    return {"device_map": "auto", "max_memory": budgets, "offload_folder": offload}


@contextmanager
def report_exhausted(advice: str = ADVICE) -> Iterator[None]:
    """Turn a failed allocation into an error that says how to continue.

    Also a decorator of functions, but not of generators.

    Args:
        advice: End of the message.

    Raises:
        CapacityError: Main memory or that of a device is used up.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or ["Python could not allocate"])[0]
        raise CapacityError(f"The memory is used up ({reason}). {advice}") from error


def limit_threads(asked: int | None = None) -> None:
    """Use the threads of a config, or no more than processors.

    PyTorch does not see the processor quota of a control group. A number of threads in
    OMP_NUM_THREADS remains. Without ``asked`` only for processes that prunekit itself started.

    Args:
        asked: Threads of this process.
    """
    if asked:
        torch.set_num_threads(asked)
        return
    threads = max(1, cgroups.usable_cpus() // local_processes())
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > threads:
        torch.set_num_threads(threads)


# From malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let malloc keep up to 1 GiB of freed memory.

    Only for processes that prunekit itself started, since the setting is process-wide.
    """
    if library := _glibc():
        library.mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        library.mallopt(TRIM_THRESHOLD, KEPT_BYTES)


def trim_heap() -> None:
    """Return free heap memory to the system, after a large one-time allocation."""
    if library := _glibc():
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
