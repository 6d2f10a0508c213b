"""The report of a run as a dictionary: what ``report.json`` holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prunekit.checkpoint.formats import Stored
from prunekit.inference import speed_table
from prunekit.runs.sparsify.plan import Plan


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
    layers = {speed_table.key(kind, dtype, said.outputs, said.inputs) for said in stored.values()}
    return {
        **facts,
        "compressed": len(stored),
        "dense": unfit,
        "speed": speed_table.describe(name, layers),
    }
