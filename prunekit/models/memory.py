"""How much memory is free, and what places a model that is larger than one device."""

import ctypes
import os
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

MARGIN = 1.15
"""What an estimate may be short of: it holds to 15 %."""
SYSTEM = Path("/")
_FILES = {
    True: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    False: ("memory.max", "memory.current"),
}
"""The limit of a control group and what it has of it, in version 1 and in version 2."""


def neighbours() -> int:
    """Return how many processes that share a run are on this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_host() -> int:
    """Return the bytes of main memory that are free, of which each process has its share.

    A control group, as of a container or of a scheduler's job, may have less than the machine.
    """
    return min([psutil.virtual_memory().available, *_left_to_groups()]) // neighbours()


def _left_to_groups() -> Iterator[int]:
    """Yield what is left to each control group that this process is in, of version 1 or 2.

    What a group has cached of files is left to it, as psutil counts it for the machine.
    """
    named = SYSTEM / "proc/self/cgroup"
    for line in named.read_text().splitlines() if named.is_file() else ():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = SYSTEM / "sys/fs/cgroup" / ("memory" if kinds else "")
        limit, usage = _FILES[bool(kinds)]
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            # In a container the path may be that of the host, of which only the root is seen.
            if not folder.is_relative_to(root) or not (folder / limit).is_file():
                continue
            if (allowed := (folder / limit).read_text().strip()) != "max":
                yield int(allowed) - int((folder / usage).read_text()) + _cached(folder)


def _cached(group: Path) -> int:
    """Return the bytes of files that a group and those below it have cached."""
    lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    facts = {name: int(number) for name, number in lines}
    # Version 1 says beside its own what those below it have.
    return sum(
        facts.get(f"total_{name}", facts.get(name, 0)) for name in ("active_file", "inactive_file")
    )


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


# From malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20
KEPT = 1 << 30


def keep() -> None:
    """Keep up to 1 GiB of what is freed; for a process that is prunekit's own."""
    if library := _glibc():
        library.mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        library.mallopt(TRIM_THRESHOLD, KEPT)


def give_back() -> None:
    """Return to the system what is free now: after something large that does not come again."""
    if library := _glibc():
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
