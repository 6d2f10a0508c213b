"""Words on the command line. Nothing heavy is imported before a command needs it.

Exit codes: 0 done; 1 it went wrong; 2 what the user gave is wrong, and nothing was written; 130
stopped from the keyboard.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from prunekit import __version__
from prunekit.errors import CapacityError, CheckpointError, ConfigError, PrunekitError, ShapeError

FAILED, REFUSED, STOPPED = 1, 2, 130

app = App(
    name="prunekit",
    help="Prune large language models: one TOML in, a proven sparse checkpoint out.",
    version=__version__,
    suppress_keyboard_interrupt=False,
    print_error=False,
    exit_on_error=False,
    result_action="return_value",
)

Overrides = Annotated[tuple[str, ...], Parameter(name="--set", negative=())]
Data = Annotated[tuple[str, ...], Parameter(negative=())]
Switch = Annotated[bool, Parameter(negative=())]


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command and return its exit code; unexpected errors pass with their traceback.

    Args:
        arguments: Those of the process if None.
    """
    try:
        return app(arguments) or 0
    except CycloptsError as error:
        return _fail(REFUSED, f"{error}\nFor help: prunekit --help")
    except (ConfigError, CheckpointError, ShapeError, CapacityError) as error:
        return _fail(REFUSED, error)
    except PrunekitError as error:
        return _fail(FAILED, error)
    except KeyboardInterrupt:
        return _fail(STOPPED, "Stopped.")


@app.command
def run(
    config: Path,
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
    from prunekit.config import load_config

    loaded = load_config(config, overrides)
    from prunekit import planning, progress, running

    try:
        plan = planning.plan(loaded)
        progress.show(running.run(plan, resume=resume, overwrite=overwrite), quiet=quiet)
    except KeyboardInterrupt:
        return _fail(STOPPED, _way_on(Path(loaded.output.path), config, overrides))
    return 0


@app.command
def plan(config: Path, *, overrides: Overrides = ()) -> None:
    """Show what a run would do, its memory and disk, without reading a weight.

    Args:
        config: A TOML file.
        overrides: KEY=VALUE wins over the config, e.g. prune.sparsity=0.6; may be repeated.
    """
    from prunekit.config import load_config

    loaded = load_config(config, overrides)
    from prunekit import planning

    _show(planning.plan(loaded).describe())


def _way_on(output: Path, config: Path, overrides: Sequence[str]) -> str:
    """Say how to go on with a run that was stopped."""
    sets = [part for override in overrides for part in ("--set", override)]
    if not (output / "journal.jsonl").is_file():
        return "Stopped; nothing was written."
    command = shlex.join(["prunekit", "run", str(config), "--resume", *sets])
    return f"Stopped; the finished blocks are kept. To go on: {command}"


def _show(renderable: object) -> None:
    from rich.console import Console

    Console(markup=False, highlight=False).print(renderable)


def _fail(code: int, message: object) -> int:
    sys.stderr.write(f"{message}\n")
    return code
