"""The report of a run that prunes weights and trains the model."""

from collections.abc import Mapping
from typing import Any

from prunekit.checkpoint.output import OutputFolder
from prunekit.runs.facts import in_report_order
from prunekit.runs.sparsify.result import (
    model_facts,
    sparsity_facts,
    sparsity_remarks,
    storage_facts,
)
from prunekit.runs.sparsify.shards import compressed_layouts
from prunekit.runs.trained.plan import TrainedPlan


def report(
    plan: TrainedPlan,
    frame: Mapping[str, Any],
    output: OutputFolder,
    trained: Mapping[str, Any],
    counted: Mapping[str, int],
) -> dict[str, Any]:
    """Return the whole report of a run.

    Args:
        plan: The plan of the run.
        frame: The keys that all reports share; see :func:`prunekit.runs.facts.report_frame`.
        output: The written checkpoint and its journal.
        trained: The journal entry that was written with the weights.
        counted: ``zeros`` and ``violations``, counted in the written files.
    """
    layers = trained["layers"]
    compressed = compressed_layouts(layers)
    gathers = [kind.name for kind in plan.recipe.needs]
    memory = {f"{name.replace(' ', '_')}_bytes": value for name, value in plan.memory.items()}
    own = {
        "model": model_facts(plan, frame["model"]),
        "calibration": frame["calibration"] and frame["calibration"] | {"gathers": gathers},
        "sparsity": sparsity_facts(plan, counted),
        "storage": storage_facts(plan, output, compressed, unfit=len(layers) - len(compressed)),
        "layers": layers,
        "notes": [*frame["notes"], *sparsity_remarks(plan, counted)],
        "training": trained["training"],
        "memory": frame["memory"] | memory,
    }
    return in_report_order({**frame, **own})
