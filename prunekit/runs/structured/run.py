"""Structured run: rank units, gate them, refit, remove, train, write and verify."""

from collections.abc import Callable, Iterator

from prunekit.runs.record import Record
from prunekit.runs.structured.blockwise_run import BlockwiseRun
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.trained_run import TrainedRun
from prunekit.runs.structured.whole_model_run import WholeModelRun


def run(
    plan: StructuredPlan,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Carry out a plan and yield its records as they are measured.

    Args:
        plan: From :func:`prunekit.runs.structured.planner.plan`.
        resume: Continue in an output folder that a stopped run left.
        overwrite: Replace an output folder.
        stop: See :meth:`RunBase.stoppable_records`.

    Raises:
        PrunekitError: The run failed; the output folder can be resumed.
    """
    kind = WholeModelRun
    if plan.by_block:
        kind = TrainedRun if plan.config.training else BlockwiseRun
    work = kind(plan)
    yield from work.stoppable_records(resume=resume, overwrite=overwrite, stop=stop)
