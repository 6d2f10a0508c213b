"""Software, hardware and peak memory of the process, for reports."""

import importlib.metadata
import platform
import resource
import sys
from datetime import UTC, datetime
from functools import cache
from typing import Any

import torch

from prunekit.models.cgroups import usable_cpus

PACKAGES = ("torch", "transformers", "triton", "safetensors", "accelerate", "lm_eval")
"""Packages whose versions are reported, where they are installed."""


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, device, platform, threads and time of a run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "python": platform.python_version(),
        **installed(),
        "device": f"{device.type}: {name}",
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def installed() -> dict[str, str]:
    """Return the versions of the installed packages among ``PACKAGES``."""
    found = {package: _version(package) for package in PACKAGES}
    return {package: version for package, version in found.items() if version}


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak bytes of the process, in main and device memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_rss_bytes": rss, "peak_device_bytes": on_device}


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    name = platform.processor() or platform.machine()
    return f"{name}, {usable_cpus()} cores"
