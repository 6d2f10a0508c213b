"""The jobs that a config can ask for: weights set to zero, units taken out, or several compared."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from prunekit.config.run_config import Config, StructuredConfig, SweepConfig
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError
from prunekit.models.devices import device_of
from prunekit.runs.record import Record
from prunekit.runs.sparsify.plan import Plan, Preflight
from prunekit.runs.sparsify.planner import plan as plan_sparsify
from prunekit.runs.sparsify.run import run as run_sparsify
from prunekit.runs.sparsify.time_estimate import estimate_time
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.planner import plan as plan_structured
from prunekit.runs.structured.run import run as run_structured
from prunekit.runs.sweep.plan import SweepPlan
from prunekit.runs.sweep.plan import plan as plan_sweep
from prunekit.runs.sweep.run import run as run_sweep

__all__ = ["Preflight", "estimate", "plan", "run"]


Job = Plan | StructuredPlan | SweepPlan


def plan(
    config: Config | StructuredConfig | SweepConfig,
    ranks: Ranks = SINGLE,
    preflight: Preflight | None = None,
) -> Job:
    """Decide everything that can be decided before a weight is read.

    Args:
        config: What the user wrote.
        ranks: The processes that share the run.
        preflight: The run is to be elsewhere; nothing of this machine is asked.

    Raises:
        PrunekitError: Something cannot work; nothing was written.
    """
    if isinstance(config, Config):
        return plan_sparsify(config, ranks, preflight)
    if isinstance(config, SweepConfig):
        if ranks.is_distributed:
            raise ConfigError("sweep: its runs are one process each. Start one.")
        return plan_sweep(config, lambda one: _plan_one(one, preflight))
    if preflight and preflight.device_memory:
        raise ConfigError(
            f"prune.pattern: {' and '.join(config.prune.pattern)} are ranked with the whole model "
            "in memory, whose size says all. Leave --device-memory out."
        )
    return plan_structured(config, ranks)


def estimate(plan: Job) -> str | None:
    """Return how long a run will take, by a short measurement; None but for one of weights.

    A run that is to be elsewhere is measured on what this machine has.
    """
    if not isinstance(plan, Plan):
        return None
    if not (plan.preflight and plan.preflight.device_memory):
        return estimate_time(plan).describe(len(plan.blocks))
    here = device_of("auto")
    told = estimate_time(replace(plan, device=here)).describe(len(plan.blocks))
    return f"at the speed of {here} here, since that of the other machine is not known: {told}"


def run(
    plan: Job,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Carry out a plan and yield what was measured, as it is measured.

    A run that was stopped, however, leaves a folder that ``resume`` goes on with; the weights are
    then the same bytes as those of a run that was not stopped. ``stop`` is asked where a run can
    stop.

    Raises:
        StoppedError: So it was asked.
        PrunekitError: See each kind; the folder then stays resumable.
    """
    if isinstance(plan, SweepPlan):
        yield from run_sweep(plan, _run_one, resume=resume, overwrite=overwrite, stop=stop)
    elif isinstance(plan, StructuredPlan):
        yield from run_structured(plan, resume=resume, overwrite=overwrite, stop=stop)
    else:
        yield from run_sparsify(plan, resume=resume, overwrite=overwrite, stop=stop)


def _plan_one(
    config: Config | StructuredConfig, preflight: Preflight | None = None
) -> Plan | StructuredPlan:
    made = plan(config, preflight=preflight)
    assert not isinstance(made, SweepPlan)
    return made


def _run_one(config: Config | StructuredConfig, resume: bool) -> Iterator[Record]:  # noqa: FBT001
    """Carry out a run of a sweep, in a process of its own."""
    yield from run(plan(config), resume=resume)
