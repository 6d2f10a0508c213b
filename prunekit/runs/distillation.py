"""The teacher of a training within a run."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from prunekit.config.distill_table import Distill
from prunekit.runs.plan_base import PlanBase
from prunekit.runs.training import trained_adapter
from prunekit.structured.unit_gates import Gates
from prunekit.training.teachers import DenseTeacher, SharedTeacher, Teacher


def teacher_of(
    plan: PlanBase, model: PreTrainedModel, gates: Sequence[Gates] = ()
) -> Teacher | None:
    """Return the current model as a teacher, or None.

    Args:
        plan: The plan of the run.
        model: The model, not pruned yet, with the adapter that is trained, if any.
        gates: Gates that are all that prunes the model during the training.
    """
    if plan.config.distill is None:
        return None
    if gates and trained_adapter(plan.config, model):
        return SharedTeacher(model, gates)
    dense = DenseTeacher(model)
    dense.model.float()
    return dense


def distillation_words(distill: Distill, last: int) -> str:
    """Return the distillation that a config asks for, in words.

    Args:
        distill: The table.
        last: Step at which it is the whole loss, if the table does not say it.
    """
    start, end = distill.steps(last)
    return (
        f"{distill.prediction:g} · divergence of predictions (temperature {distill.temperature:g}) "
        f"+ {distill.layers:g} · distance of hidden states (map {distill.map}), rising to the "
        f"whole loss from step {start} to {end}"
    )
