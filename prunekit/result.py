"""The report of a run as a dictionary: what ``report.json`` holds."""

import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from prunekit import tuning
from prunekit.data import Tokens
from prunekit.formats import Stored
from prunekit.planning import Plan
from prunekit.shrink_planning import ShrinkPlan

PACKAGES = ("torch", "transformers", "triton", "safetensors", "accelerate")


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a run depends on besides its config."""
    installed = {package: _version(package) for package in PACKAGES}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "python": platform.python_version(),
        **{package: version for package, version in installed.items() if version},
        "device": f"{device.type}: {name}",
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the most that the process has held at once, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_rss_bytes": rss, "peak_device_bytes": on_device}


def model_facts(plan: Plan) -> dict[str, Any]:
    """Return what the model is."""
    return {
        "path": plan.config.model.path,
        "architecture": type(plan.model).__name__,
        "model_type": plan.model.config.model_type,
        "parameters": plan.parameters,
        "prunable_parameters": sum(plan.sizes.values()),
        "blocks": len(plan.blocks),
        "dtype": "/".join(
            sorted({str(kind).removeprefix("torch.") for kind in plan.stored.values()})
        ),
        "compute_dtype": str(plan.dtype).removeprefix("torch."),
        "probed": plan.architecture.probed,
    }


def calibration_facts(plan: Plan | ShrinkPlan, tokens: Tokens | None) -> dict[str, Any] | None:
    """Return what the statistics were gathered from."""
    if tokens is None or plan.config.calibration is None:
        return None
    samples, length = tokens.ids.shape
    return {
        "description": tokens.description,
        "samples": samples,
        "length": length,
        "tokens": samples * length,
        "seed": plan.config.calibration.seed,
        "sha256": tokens.digest,
    }


def sparsity_facts(plan: Plan, counted: dict[str, int]) -> dict[str, Any]:
    """Return what was asked for and what was counted in the written files."""
    of = sum(plan.sizes.values())
    return {
        "target": plan.config.prune.sparsity,
        "achieved": counted["zeros"] / of,
        "zeros": counted["zeros"],
        "of": of,
        "whole_model": counted["zeros"] / plan.parameters,
        "pattern": plan.recipe.pattern.name,
        "violations": counted["violations"],
    }


def storage_facts(
    plan: Plan, folder: Path, stored: Mapping[str, Stored], unfit: int
) -> dict[str, Any]:
    """Return how the result is stored and what that does for its size and its speed.

    Args:
        plan: Of the run.
        folder: Where the result is.
        stored: What is compressed.
        unfit: Pruned linears that the format does not fit, so that they are dense.
    """
    kind, before = plan.config.output.format, plan.checkpoint.entries.values()
    facts = {
        "format": kind,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "bytes_before": sum(file.stat().st_size for file in {entry.file for entry in before}),
    }
    if kind == "dense":
        speed = (
            "Zeros in dense files save neither space nor time; prunekit convert makes them small."
        )
        return {**facts, "speed": speed}
    name = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else "CPU"
    dtype = str(plan.dtype).removeprefix("torch.")
    layers = {tuning.key(kind, dtype, said.outputs, said.inputs) for said in stored.values()}
    return {
        **facts,
        "compressed": len(stored),
        "dense": unfit,
        "speed": tuning.said(name, layers),
    }


def paired(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join what was measured before and after on the same text."""
    pairs: dict[str, dict[str, Any]] = {}
    for entry in evaluations:
        pair = pairs.setdefault(entry["source"], {"data": entry["data"], "metric": entry["metric"]})
        pair[entry["which"]] = entry["value"]
        pair["protocol"] = entry["protocol"]
    return list(pairs.values())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
