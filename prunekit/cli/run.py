"""TODO-DOC prunekit/cli/run.py (out of prunekit/cli.py)."""

import gc
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, current_thread, main_thread

from prunekit.cli.app import (
    FAILED,
    STOPPED,
    TERMINATED,
    Overrides,
    Switch,
    app,
    at_least,
    fail,
    show,
)
from prunekit.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    ShapeError,
    StoppedError,
)


@app.command
def run(
    config: Path,
    /,
    *,
    resume: Switch = False,
    overwrite: Switch = False,
    overrides: Overrides = (),
    quiet: Switch = False,
) -> int:
    """Prune a model as a config says.

    Args:
        config: A TOML file; "prunekit init" writes one.
        resume: Go on with a run that was stopped.
        overwrite: Replace the output of an earlier run.
        overrides: KEY=VALUE wins over the config, e.g. prune.sparsity=0.6; may be repeated.
        quiet: Show no progress.
    """
    from prunekit.config.load import load_config

    loaded = load_config(config, overrides)
    # A fifth of the time that these imports take goes to looking for garbage, and there is none.
    gc.disable()
    from prunekit.cli import progress
    from prunekit.distributed.ranks import join
    from prunekit.models import memory as allocator
    from prunekit.runs import jobs

    gc.enable()
    gc.freeze()
    allocator.keep()
    plan = None
    try:
        with join(loaded.model.device) as ranks, _terminable() as asked:
            plan = jobs.plan(loaded, ranks)
            records = jobs.run(plan, resume=resume, overwrite=overwrite, stop=asked.is_set)
            progress.show(records, quiet=quiet or not ranks.is_main)
    except (CheckpointError, ShapeError, CapacityError) as error:
        if plan is None:
            raise
        # What the plan had accepted went wrong on the way, so it is no longer the user's input.
        return fail(FAILED, error)
    except (KeyboardInterrupt, StoppedError) as error:
        code = TERMINATED if isinstance(error, StoppedError) else STOPPED
        return fail(code, _way_on(Path(loaded.output.path), config, overrides))
    return 0


@contextmanager
def _terminable() -> Iterator[Event]:
    """Give an event that SIGTERM sets, by which schedulers say that time is up."""
    asked = Event()
    if current_thread() is not main_thread():
        yield asked  # where signals cannot be handled
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command
def plan(
    config: Path,
    /,
    *,
    world_size: int = 1,
    device_memory: str | None = None,
    host_memory: str | None = None,
    overrides: Overrides = (),
) -> None:
    """Show what a run would do, its memory and disk, without reading a weight.

    Of the model its config.json is enough.

    Args:
        config: A TOML file.
        world_size: Processes that would share the run; the memory shown is that of each.
        device_memory: Of each GPU, such as 80GB, where the run is to be elsewhere.
        host_memory: Main memory there for each process, such as 200GB; unless said, enough.
        overrides: KEY=VALUE wins over the config, e.g. prune.sparsity=0.6; may be repeated.
    """
    from prunekit.config.load import load_config

    loaded = load_config(config, overrides)
    memory = _bytes("--device-memory", device_memory)
    main = _bytes("--host-memory", host_memory)
    if main and not memory:
        raise ConfigError("--host-memory: goes with --device-memory, for a run elsewhere.")
    at_least(1, "--world-size", world_size)
    from prunekit.distributed.ranks import Ranks
    from prunekit.runs import jobs

    ranks, preflight = Ranks(0, world_size), jobs.Preflight(memory, main)
    made = jobs.plan(loaded, ranks, preflight)
    show(made.describe())
    if estimate := jobs.estimate(made):
        show(f"time: {estimate}")


def _bytes(option: str, text: str | None) -> int | None:
    from prunekit.formatting import bytes_of

    if text is None:
        return None
    if not (said := bytes_of(text)):
        raise ConfigError(f"{option} {text}: write a number of GB, such as 80GB.")
    return said


def _way_on(output: Path, config: Path, overrides: Sequence[str]) -> str:
    """Say how to go on with a run that was stopped."""
    sets = [part for override in overrides for part in ("--set", override)]
    if not (output / "journal.jsonl").is_file():
        return "Stopped; nothing was written."
    command = shlex.join(["prunekit", "run", str(config), "--resume", *sets])
    return f"Stopped; the finished blocks are kept. To go on: {command}"
