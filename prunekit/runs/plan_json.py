"""Plans as plain values, for programs."""

from dataclasses import asdict, is_dataclass
from typing import Any

from prunekit.runs.plan_base import PlanBase
from prunekit.runs.sparsify.plan import WeightsPlan
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.sweep.plan import SweepPlan
from prunekit.runs.training_memory import saved_state_disk


def plan_values(plan: PlanBase | SweepPlan) -> dict[str, Any]:
    """Return a plan as JSON has it: bytes and counts as numbers.

    Args:
        plan: From :func:`prunekit.plan`.
    """
    if isinstance(plan, SweepPlan):
        runs = {name: plan_values(one) for name, one in plan.runs.items()}
        return {"kind": "sweep", "output": str(plan.folder), "runs": runs}
    return {
        "kind": _kind(plan),
        "config": plan.config.dump(),
        "model": {
            "path": plan.config.model.path,
            "architecture": type(plan.model).__name__,
            "parameters": plan.parameters,
            "prunable_parameters": plan.prunable,
            "blocks": plan.block_count,
        },
        "device": str(plan.device),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "processes": plan.ranks.size,
        "lengths": {"calibration": plan.lengths[0], "evaluation": plan.lengths[1]},
        "memory_bytes": _memory(plan),
        "disk_bytes": {
            "checkpoint": plan.checkpoint.nbytes,
            "joining": plan.joining,
            "training": saved_state_disk(plan),
        },
        "notes": list(plan.notes),
        **_places(plan),
    }


def _kind(plan: PlanBase) -> str:
    if isinstance(plan, StructuredPlan):
        return "units"
    return "weights, trained" if plan.config.training else "weights"


def _memory(plan: PlanBase) -> dict[str, Any]:
    """Return the bytes that a process needs, by use."""
    memory: Any = getattr(plan, "memory", {})
    values: dict[str, Any] = asdict(memory) if is_dataclass(memory) else dict(memory)  # pyright: ignore
    return {name: value for name, value in values.items() if not isinstance(value, bool)}


def _places(plan: PlanBase) -> dict[str, Any]:
    """Return what is pruned: linears, or groups of units by kind."""
    if isinstance(plan, StructuredPlan):
        groups = {
            kind: [
                {"name": group.name, "units": group.units, "parameters": group.parameters_per_unit}
                for group in groups
            ]
            for kind, groups in plan.groups.items()
        }
        return {"units": groups}
    assert isinstance(plan, WeightsPlan)
    linears = [
        {
            "name": linear.name,
            "outputs": linear.outputs,
            "inputs": linear.inputs,
            "dtype": str(plan.stored[linear.name]).removeprefix("torch."),
            "skipped": linear.skipped,
        }
        for linear in plan.linears
    ]
    return {"linears": linears}
