"""TODO-DOC prunekit/cli/app.py (out of prunekit/cli.py)."""

import os
import sys
from typing import Annotated

from cyclopts import App, Parameter

from prunekit._version import __version__
from prunekit.errors import ConfigError

FAILED, REFUSED, STOPPED, TERMINATED = 1, 2, 130, 143

app = App(
    name="prunekit",
    help="Prune large language models: one TOML in, a proven sparse checkpoint out.",
    version=__version__,
    suppress_keyboard_interrupt=False,
    print_error=False,
    exit_on_error=False,
    result_action="return_value",
)

Overrides = Annotated[tuple[str, ...], Parameter(name="--set", negative=(), show_default=False)]
Switch = Annotated[bool, Parameter(negative=(), show_default=False)]


def at_least(least: int, option: str, number: int | None) -> None:
    if number is not None and number < least:
        raise ConfigError(f"{option} {number}: is at least {least}.")


def show(renderable: object) -> None:
    from rich.console import Console

    # Names are not to be cut where the output is not a terminal, which has no width.
    width = None if sys.stdout.isatty() else 160
    Console(highlight=False, width=width).print(renderable)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def fail(code: int, message: object) -> int:
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(f"{message}\n" if rank == "0" else f"Rank {rank}: {message}\n")
    return code
