"""Limits of this process's control groups, of versions 1 and 2.

A container or a scheduler's job may have less memory and fewer processors than the machine.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

FILE_SYSTEM_ROOT = Path("/")
_FILES = {
    ("memory", 1): ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("memory", 2): ("memory.max", "memory.current"),
    ("cpu", 1): ("cpu.cfs_quota_us", "cpu.cfs_period_us"),
    ("cpu", 2): ("cpu.max", "cpu.max"),
}
"""Files with the limit, and with the usage or period, by controller and version."""


def free_memory() -> Iterator[int]:
    """Yield the free bytes of each control group that limits memory.

    The file cache of a group counts as free, as in psutil's number for the machine.
    """
    for folder, limit, usage in _limits("memory"):
        if limit != "max":
            yield max(0, int(limit) - int(usage) + _file_cache_bytes(folder))


def usable_cpus() -> int:
    """Return the number of processors that this process may keep busy.

    That is its affinity, or the processor time of its control groups where they have less.
    """
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()]
    for _, limit, period in _limits("cpu"):
        quota, length = limit.split()[0], period.split()[-1]
        if quota not in {"max", "-1"}:
            counts.append(math.ceil(int(quota) / int(length)))
    return max(1, min(count or 1 for count in counts))


def _limits(controller: str) -> Iterator[tuple[Path, str, str]]:
    """Yield folder, limit and usage (or period) of each control group.

    A control group counts if this process is in it and it has a limit file.
    """
    for line in _read(FILE_SYSTEM_ROOT / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = FILE_SYSTEM_ROOT / "sys/fs/cgroup" / (controller if controllers else "")
        first, second = _FILES[controller, 1 if controllers else 2]
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            # In a container the path may be that of the host; only its root is visible here.
            if folder.is_relative_to(root) and (limit := _read(folder / first)):
                yield folder, limit, _read(folder / second)


def _file_cache_bytes(group: Path) -> int:
    """Return the file cache in bytes of a control group, descendants included."""
    lines = (line.split() for line in _read(group / "memory.stat").splitlines())
    statistics = {name: int(number) for name, number in lines}
    # Version 1 reports the totals including descendants separately.
    return sum(
        statistics.get(f"total_{name}", statistics.get(name, 0))
        for name in ("active_file", "inactive_file")
    )


def _read(file: Path) -> str:
    """Return the content of a kernel file; empty if not visible."""
    try:
        return file.read_text("utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""
