"""The commands ``prunekit run`` and ``prunekit plan``."""

import gc
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.cli.app import (
    EXIT_FAILED,
    EXIT_TERMINATED,
    Json,
    Overrides,
    Switch,
    app,
    check_at_least,
    print_json,
    print_line,
    print_table,
    report_error,
)
from prunekit.cli.signals import StopSignals
from prunekit.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    ShapeError,
    StoppedError,
)

if TYPE_CHECKING:
    from prunekit.config.run_config import Config, StructuredConfig, SweepConfig

MOST_RANKS = 100_000


@app.command
def run(
    config: Path,
    /,
    *,
    resume: Switch = False,
    overwrite: Switch = False,
    overrides: Overrides = (),
    quiet: Switch = False,
    gpus: int | None = None,
) -> int:
    """Prune a model as a config says.

    Args:
        config: A TOML file; "prunekit init" writes one.
        resume: Continue a run that was stopped.
        overwrite: Replace the output of an earlier run.
        overrides: KEY=VALUE overrides the config, e.g. prune.sparsity=0.6; may be repeated.
        quiet: Show no progress.
        gpus: Start so many processes, each on a GPU of this machine, or all on its CPU if
            model.device is "cpu".
    """
    loaded = _load(config, overrides)
    if gpus is not None:
        from prunekit.cli.launch import check_can_launch, launch

        check_can_launch(gpus, loaded)
        if gpus > 1:
            switches = {"--resume": resume, "--overwrite": overwrite, "--quiet": quiet}
            chosen = [name for name, on in switches.items() if on]
            return launch(gpus, ["run", str(config), *chosen, *_sets(overrides)])
    hint = partial(_resume_hint, Path(loaded.output.path), config, overrides)
    return run_here(loaded, hint, resume=resume, overwrite=overwrite, quiet=quiet)


def run_here(
    loaded: "Config | StructuredConfig | SweepConfig",
    resume_hint: Callable[[], str],
    *,
    resume: bool,
    overwrite: bool,
    quiet: bool,
) -> int:
    """Plan and carry out a run here; return the exit code.

    Args:
        loaded: The config.
        resume_hint: Returns the message of an interrupted run.
        resume: Continue a run that was stopped.
        overwrite: Replace the output of an earlier run.
        quiet: Show no progress.
    """
    # Garbage collection would take a fifth of the time of these imports and find nothing.
    gc.disable()
    from prunekit.cli import progress
    from prunekit.distributed.join import join
    from prunekit.models import memory
    from prunekit.runs import jobs

    gc.enable()
    gc.freeze()
    memory.keep_freed_memory()
    memory.limit_threads()
    plan, signals = None, StopSignals()
    try:
        with signals, join(loaded.model.device) as ranks:
            plan = jobs.plan(loaded, ranks)
            signals.patient = True
            records = jobs.run(plan, resume=resume, overwrite=overwrite, stop=signals.requested)
            progress.display(records, quiet=quiet or not ranks.is_main)
    except (CheckpointError, ShapeError, CapacityError) as error:
        if plan is None:
            raise
        # The plan accepted the input, so this failure is not an input error.
        return report_error(EXIT_FAILED, error)
    except (KeyboardInterrupt, StoppedError) as error:
        # Where only another rank got a signal, all stop.
        here = signals.requested() or isinstance(error, KeyboardInterrupt)
        code = signals.exit_code if here else EXIT_TERMINATED
        return report_error(code, resume_hint())
    return 0


@app.command
def plan(
    config: Path,
    /,
    *,
    world_size: int = 1,
    device_memory: str | None = None,
    host_memory: str | None = None,
    overrides: Overrides = (),
    as_json: Json = False,
) -> None:
    """Show the plan of a run with its memory, disk and time.

    No weights are read: the model's config.json is enough.

    Args:
        config: A TOML file.
        world_size: Number of processes that would share the run; memory is shown per process.
        device_memory: Memory of each GPU, such as 80GB, to plan for another machine.
        host_memory: Main memory per process there, such as 200GB; unlimited if left out.
        overrides: KEY=VALUE overrides the config, e.g. prune.sparsity=0.6; may be repeated.
        as_json: Print JSON, with bytes and counts as numbers.
    """
    loaded = _load(config, overrides)
    on_device = _parse_size("--device-memory", device_memory)
    on_host = _parse_size("--host-memory", host_memory)
    if on_host and not on_device:
        raise ConfigError("--host-memory: needs --device-memory too, to plan for another machine.")
    check_at_least(1, "--world-size", world_size)
    if world_size > MOST_RANKS:
        raise ConfigError(f"--world-size {world_size}: must be at most {MOST_RANKS:,}.")
    from prunekit.distributed.ranks import Ranks
    from prunekit.runs import jobs

    ranks, preflight = Ranks(0, world_size), jobs.Preflight(on_device, on_host)
    made = jobs.plan(loaded, ranks, preflight)
    if as_json:
        from prunekit.runs.plan_json import plan_values

        print_json(plan_values(made))
        return
    print_table(made.describe())
    if estimate := jobs.estimate(made):
        print_line(f"time: {estimate}")


def _load(config: Path, overrides: Sequence[str]) -> "Config | StructuredConfig | SweepConfig":
    """Load a config; refuse one inside its own output folder."""
    from prunekit.checkpoint.output_path import check_apart
    from prunekit.config.load import load_config

    loaded = load_config(config, overrides)
    check_apart(Path(loaded.output.path), [config])
    return loaded


def _sets(overrides: Sequence[str]) -> list[str]:
    """Return the command-line arguments of overrides."""
    return [part for override in overrides for part in ("--set", override)]


def _parse_size(option: str, text: str | None) -> int | None:
    from prunekit.formatting import parse_bytes

    if text is None:
        return None
    if not (size := parse_bytes(text)):
        raise ConfigError(f"{option} {text}: write a number with a unit, such as 80GB.")
    return size


def _resume_hint(output: Path, config: Path, overrides: Sequence[str]) -> str:
    """Return the message of an interrupted run, with the command to resume."""
    from prunekit.cli.launch import launched_ranks

    gpus = ["--gpus", str(count)] if (count := launched_ranks()) else []
    command = shlex.join(["prunekit", "run", str(config), "--resume", *gpus, *_sets(overrides)])
    return stopped_hint(output, command)


def stopped_hint(output: Path, command: str) -> str:
    """Return the message of an interrupted run.

    Args:
        output: Its output folder.
        command: Continues it.
    """
    if not (output / "journal.jsonl").is_file():
        return "Stopped; nothing was written."
    return f"Stopped; finished blocks are kept. To resume: {command}"
