"""The jobs that a config can ask for: weights set to zero, or units taken out."""

from collections.abc import Callable, Iterator

from prunekit import planning, running, shrink_planning, shrink_running
from prunekit.config import Config, ShrinkConfig
from prunekit.errors import ConfigError
from prunekit.framing import Record
from prunekit.planning import Plan, Preflight
from prunekit.ranks import ALONE, Ranks
from prunekit.shrink_planning import ShrinkPlan

__all__ = ["Preflight", "plan", "run"]


def plan(
    config: Config | ShrinkConfig, ranks: Ranks = ALONE, preflight: Preflight | None = None
) -> Plan | ShrinkPlan:
    """Decide everything that can be decided before a weight is read.

    Args:
        config: What the user wrote.
        ranks: The processes that share the run.
        preflight: The run is to be elsewhere; nothing of this machine is asked.

    Raises:
        PrunekitError: Something cannot work; nothing was written.
    """
    if isinstance(config, Config):
        return planning.plan(config, ranks, preflight)
    if ranks.several or (preflight and preflight.device_memory):
        raise ConfigError(
            f"prune.pattern: {' and '.join(config.prune.pattern)} are taken out by one process, "
            "with the whole model in its memory. Start one, without --world-size and "
            "--device-memory."
        )
    return shrink_planning.plan(config)


def run(
    plan: Plan | ShrinkPlan,
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
    if isinstance(plan, ShrinkPlan):
        yield from shrink_running.run(plan, resume=resume, overwrite=overwrite, stop=stop)
    else:
        yield from running.run(plan, resume=resume, overwrite=overwrite, stop=stop)
