"""Free host and device memory (cgroup-aware), and accelerate device maps."""

import ctypes
import math
import os
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

ESTIMATE_MARGIN = 1.15
"""Safety factor on memory estimates, which are accurate to 15 %."""
FILE_SYSTEM_ROOT = Path("/")
_CGROUP_FILES = {
    True: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    False: ("memory.max", "memory.current"),
}
"""Files with limit and usage of a control group, by whether it is of cgroup version 1."""


def local_processes() -> int:
    """Return the number of ranks on this machine, including this one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_host_bytes() -> int:
    """Return the free main memory in bytes per rank on this machine.

    The control group of a container or a scheduler's job may have less than the machine.
    """
    return min([psutil.virtual_memory().available, *_cgroup_free_bytes()]) // local_processes()


def _cgroup_free_bytes() -> Iterator[int]:
    """Yield the free bytes of each control group of this process.

    Versions 1 and 2 of control groups are supported. The file cache of a group counts as free, as
    in psutil's number for the machine.
    """
    membership = FILE_SYSTEM_ROOT / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = FILE_SYSTEM_ROOT / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, usage = _CGROUP_FILES[bool(controllers)]
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            # In a container the path may be that of the host; only its root is visible here.
            if not folder.is_relative_to(root) or not (folder / limit).is_file():
                continue
            if (allowed := (folder / limit).read_text().strip()) != "max":
                yield int(allowed) - int((folder / usage).read_text()) + _file_cache_bytes(folder)


def _file_cache_bytes(group: Path) -> int:
    """Return the file cache in bytes of a control group, descendants included."""
    lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    statistics = {name: int(number) for name, number in lines}
    # Version 1 reports the totals including descendants separately.
    return sum(
        statistics.get(f"total_{name}", statistics.get(name, 0))
        for name in ("active_file", "inactive_file")
    )


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
