"""The report of a sparsify run: the content of ``report.json``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prunekit.checkpoint.formats import WeightLayout
from prunekit.checkpoint.output import OutputFolder
from prunekit.inference import speed_table
from prunekit.methods.quantize import Quantization
from prunekit.runs.facts import in_report_order
from prunekit.runs.sparsify.plan import Plan, WeightsPlan
from prunekit.runs.sparsify.quantization import quantization_words

REMARKABLE = 0.0005
"""Difference of the sparsity asked for and written, from which on it is remarked."""


def report(
    plan: Plan,
    frame: Mapping[str, Any],
    output: OutputFolder,
    layers: Sequence[dict[str, Any]],
    compressed: Mapping[str, WeightLayout],
    counted: Mapping[str, int],
) -> dict[str, Any]:
    """Return the whole report of a run.

    Args:
        plan: The plan of the run.
        frame: The keys that all reports share; see :func:`prunekit.runs.facts.report_frame`.
        output: The written checkpoint and its journal.
        layers: Report entry of each pruned linear.
        compressed: Layout of each linear that is stored compressed, by name.
        counted: ``zeros`` and ``violations``, counted in the written files.
    """
    calibration, needs = frame["calibration"], plan.memory
    storage = storage_facts(plan, output, compressed, unfit=len(layers) - len(compressed))
    gathers = [kind.name for kind in plan.recipe.needs]
    own = {
        "model": model_facts(plan, frame["model"]),
        "calibration": calibration and calibration | {"hidden": needs.where, "gathers": gathers},
        "sparsity": sparsity_facts(plan, counted),
        "storage": storage | quantized_facts(plan.recipe.quantize, layers),
        "layers": list(layers),
        "notes": [*frame["notes"], *sparsity_remarks(plan, counted)],
        "memory": frame["memory"]
        | {
            "block_bytes": needs.block,
            "statistics_bytes": needs.statistics,
            "hidden_bytes": needs.hidden,
        },
    }
    return in_report_order({**frame, **own})


def sparsity_remarks(plan: WeightsPlan, counted: Mapping[str, int]) -> list[str]:
    """Return a note if the zeros written are not those asked for.

    Args:
        plan: The plan of the run.
        counted: ``zeros``, counted in the written files.
    """
    asked, zeros = plan.config.prune.sparsity, counted["zeros"]
    only_quantizes = asked == 0 and plan.config.output.quantize
    if only_quantizes or abs(zeros / plan.prunable - asked) < REMARKABLE:
        return []
    reason = (
        f'each group of the pattern "{plan.recipe.pattern.name}", such as a row, has a '
        "whole number of them, rounded down"
        if zeros < asked * plan.prunable
        else "more were zero before, or were rounded to zero where they were written"
    )
    return [
        f"prune.sparsity: {100 * asked:.5g} % of the weights were asked for as zeros, "
        f"{100 * zeros / plan.prunable:.5g} % are: {reason}."
    ]


def model_facts(plan: WeightsPlan, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``shared`` facts of the model with its dtypes and ``probed``."""
    stored = sorted({str(dtype).removeprefix("torch.") for dtype in plan.stored.values()})
    return {
        **shared,
        "dtype": "/".join(stored),
        "compute_dtype": str(plan.dtype).removeprefix("torch."),
        "probed": plan.architecture.probed,
    }


def sparsity_facts(plan: WeightsPlan, counted: Mapping[str, int]) -> dict[str, Any]:
    """Return the requested sparsity and the one counted in the written files."""
    return {
        "target": plan.config.prune.sparsity,
        "achieved": counted["zeros"] / plan.prunable,
        "zeros": counted["zeros"],
        "of": plan.prunable,
        "whole_model": counted["zeros"] / plan.parameters,
        "pattern": plan.recipe.pattern.name,
        "violations": counted["violations"],
    }


def storage_facts(
    plan: WeightsPlan, output: OutputFolder, compressed: Mapping[str, WeightLayout], *, unfit: int
) -> dict[str, Any]:
    """Return format and size of the written checkpoint, and its expected speed.

    Args:
        plan: The plan of the run.
        output: The written checkpoint.
        compressed: Layout of each linear that is stored compressed, by name.
        unfit: Number of pruned linears that are stored dense, as the format does not fit them.
    """
    kind, before = plan.config.output.format, plan.checkpoint.entries.values()
    files = output.folder.glob("*.safetensors")
    facts = {
        "format": kind,
        "bytes": sum(file.stat().st_size for file in files),
        "bytes_before": sum(file.stat().st_size for file in {entry.file for entry in before}),
    }
    if kind == "dense":
        speed = (
            "Zeros in dense files save neither space nor time; prunekit convert makes them small."
        )
        return {**facts, "speed": speed}
    name = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else "CPU"
    dtype = str(plan.dtype).removeprefix("torch.")
    layers = {
        speed_table.layer_key(kind, dtype, each.outputs, each.inputs)
        for each in compressed.values()
    }
    return {
        **facts,
        "compressed": len(compressed),
        "dense": unfit,
        "speed": speed_table.describe(name, layers),
    }


def quantized_facts(
    quantization: Quantization | None, layers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return how weights were rounded, and what became of the zeros before.

    Args:
        quantization: How; None if they were not, which leaves no facts.
        layers: Report entry of each quantized linear.
    """
    if quantization is None:
        return {}
    facts = {
        "scheme": quantization.scheme,
        "group": quantization.group,
        "words": quantization_words(quantization),
        "zeros_before": sum(layer["zeros_pruned"] for layer in layers),
        "refilled": sum(layer["refilled"] for layer in layers),
    }
    speed = (
        "Engines that read compressed-tensors, such as vLLM, keep the codes in memory; "
        "transformers expands them as it loads."
    )
    return {"quantized": facts, "speed": speed}
