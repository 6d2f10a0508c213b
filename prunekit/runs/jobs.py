"""The jobs that a config can describe, and their dispatch.

========== ================ ============== =================================================
job        config           plan           work
========== ================ ============== =================================================
sparsify   Config           Plan           set weights to zero, block by block
trained    Config, [train]  TrainedPlan    set weights to zero, and train the model
structured StructuredConfig StructuredPlan remove heads, neurons, hidden dimensions or blocks
sweep      SweepConfig      SweepPlan      carry out several of the above and compare them
========== ================ ============== =================================================
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from prunekit.checkpoint.push import check_can_push, push
from prunekit.config.run_config import Config, StructuredConfig, SweepConfig
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError, GateError
from prunekit.models.devices import resolve_device
from prunekit.models.memory import limit_threads, report_exhausted
from prunekit.reports import model_card
from prunekit.runs.advice.base import Subject
from prunekit.runs.advice.rules import remarks
from prunekit.runs.gates import failures
from prunekit.runs.preflight import Preflight
from prunekit.runs.rank_facts import config_facts, plan_facts
from prunekit.runs.record import Record
from prunekit.runs.sparsify.plan import Plan
from prunekit.runs.sparsify.planner import plan as plan_sparsify
from prunekit.runs.sparsify.run import run as run_sparsify
from prunekit.runs.sparsify.time_estimate import estimate_time as time_of_weights
from prunekit.runs.stage import Stage
from prunekit.runs.status import followed
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.planner import plan as plan_structured
from prunekit.runs.structured.run import run as run_structured
from prunekit.runs.structured.time_estimate import estimate_time as time_of_units
from prunekit.runs.sweep.plan import SweepPlan
from prunekit.runs.sweep.plan import plan as plan_sweep
from prunekit.runs.sweep.run import run as run_sweep
from prunekit.runs.time_estimate import TimeEstimate
from prunekit.runs.trained.plan import TrainedPlan
from prunekit.runs.trained.planner import plan as plan_trained
from prunekit.runs.trained.run import run as run_trained

__all__ = ["JobPlan", "Preflight", "estimate", "plan", "run"]

JobPlan = Plan | StructuredPlan | SweepPlan | TrainedPlan
RESUME = (
    "Finished work is kept: free some memory or take a machine with more, then run again with "
    "--resume. Fewer or shorter calibration samples need less, but are another run."
)


@report_exhausted()
def plan(
    config: Config | StructuredConfig | SweepConfig,
    ranks: Ranks = SINGLE,
    preflight: Preflight | None = None,
) -> JobPlan:
    """Plan a job without reading any weight.

    Args:
        config: The user's config.
        ranks: Processes that will share the run.
        preflight: Memory of another machine; this one is then not checked.

    Raises:
        PrunekitError: The job cannot work, or ranks differ; nothing was written.
    """
    if not isinstance(config, Config | StructuredConfig | SweepConfig):
        raise ConfigError(
            f"plan: a {type(config).__name__} is no config; prunekit.load_config returns one."
        )
    ranks.require_same(config_facts(config))
    if config.output.push and not (preflight and preflight.device_memory):
        check_can_push(config.output.push, "output.push")
    made = _plan(config, ranks, preflight)
    if not isinstance(made, SweepPlan):
        made = replace(made, notes=(*made.notes, *remarks(Subject.of(made))))
        _, notes = model_card.source_facts(made.checkpoint.folder)
        made = replace(made, notes=(*made.notes, *notes))
        ranks.require_same(plan_facts(made))
    return made


def _plan(
    config: Config | StructuredConfig | SweepConfig, ranks: Ranks, preflight: Preflight | None
) -> JobPlan:
    if isinstance(config, Config):
        planned = plan_trained if config.train else plan_sparsify
        return planned(config, ranks, preflight)
    if isinstance(config, SweepConfig):
        if ranks.is_distributed:
            raise ConfigError("sweep: its runs are one process each. Start one.")
        if config.output.push:
            raise ConfigError("output.push: a sweep makes several models. Choose one, and push it.")
        return plan_sweep(config, lambda one: _plan_one(one, preflight))
    return plan_structured(config, ranks, preflight)


def estimate(plan: JobPlan) -> str | None:
    """Return the estimated time of a run, in words.

    It is None for a sweep or a training. The speed is measured for about a second, on this machine
    even if the run is for another.
    """
    if isinstance(plan, SweepPlan | TrainedPlan) or plan.config.training:
        return None
    if not (plan.preflight and plan.preflight.device_memory):
        return _estimate_time(plan).describe(plan.block_count)
    here = resolve_device("auto")
    duration = _estimate_time(replace(plan, device=here)).describe(plan.block_count)
    return f"at the speed of {here} here, since that of the other machine is not known: {duration}"


def _estimate_time(plan: Plan | StructuredPlan) -> TimeEstimate:
    if isinstance(plan, Plan):
        return time_of_weights(plan)
    return time_of_units(plan)


def run(
    plan: JobPlan,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Carry out a plan and yield its records as they are measured.

    A run that ends early for any reason can be resumed; its weights are then the same bytes as
    those of an uninterrupted run.

    Args:
        plan: From :func:`plan`.
        resume: Continue in an output folder that a stopped run left.
        overwrite: Replace an output folder.
        stop: Called wherever the run can stop; True stops it.

    Raises:
        StoppedError: ``stop()`` returned True.
        GateError: A limit of ``[gates]`` is not met; raised after the last record.
        CapacityError: Memory or disk is used up; the output folder can be resumed.
        PrunekitError: The run failed; the output folder can be resumed.
    """
    if not isinstance(plan, JobPlan):
        raise ConfigError(f"run: a {type(plan).__name__} is no plan; prunekit.plan makes one.")
    if threads := plan.config.model.threads:
        limit_threads(threads)
    with report_exhausted(RESUME):
        records = _judged(plan, _records(plan, resume=resume, overwrite=overwrite, stop=stop))
        main = isinstance(plan, SweepPlan) or plan.ranks.is_main
        with closing(followed(records, Path(plan.config.output.path), writes=main)) as all_records:
            yield from all_records


def _records(
    plan: JobPlan, *, resume: bool, overwrite: bool, stop: Callable[[], bool]
) -> Generator[Record, None, None]:
    """Yield the records of any kind of plan."""
    options = {"resume": resume, "overwrite": overwrite, "stop": stop}
    if isinstance(plan, SweepPlan):
        yield from run_sweep(plan, _run_one, **options)
    elif isinstance(plan, StructuredPlan):
        yield from run_structured(plan, **options)
    elif isinstance(plan, TrainedPlan):
        yield from run_trained(plan, **options)
    else:
        yield from run_sparsify(plan, **options)


def _judged(plan: JobPlan, records: Generator[Record, None, None]) -> Generator[Record, None, None]:
    """Yield records; upload a model that keeps the limits, else fail.

    Raises:
        GateError: A limit is not met, and the config does not say to keep the model.
    """
    failed = ""
    with closing(records):
        for record in records:
            if record.kind == "finish" and not isinstance(plan, SweepPlan):
                gates = plan.config.gates
                failed = failures(record.values) if gates and gates.on_fail == "fail" else ""
                if not failed:
                    yield from _pushed(plan)
            yield record
    if failed:
        raise GateError(
            f"{failed}\nThe checkpoint and its report are in {plan.config.output.path}."
        )


def _pushed(plan: JobPlan) -> Iterator[Record]:
    """Upload the finished checkpoint, if the config asks for it."""
    output = plan.config.output
    if output.push is None:
        return
    assert not isinstance(plan, SweepPlan)
    yield Record("phase", f"upload to {output.push}", {"steps": 1}, Stage.EXPORTING)
    folder, name = Path(output.path), output.push
    url = plan.ranks.run_on_main(lambda: push(folder, name))
    yield Record("step", url)


def _plan_one(
    config: Config | StructuredConfig, preflight: Preflight | None = None
) -> Plan | StructuredPlan | TrainedPlan:
    made = _plan(config, SINGLE, preflight)  # without remarks, as a sweep compares
    assert not isinstance(made, SweepPlan)
    return made


def _run_one(config: Config | StructuredConfig, resume: bool) -> Iterator[Record]:  # noqa: FBT001
    """Plan and carry out one run of a sweep (in a worker)."""
    yield from run(_plan_one(config), resume=resume)
