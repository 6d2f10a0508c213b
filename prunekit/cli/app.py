"""The cyclopts application, its exit codes, and output shared by commands."""

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from prunekit._version import __version__
from prunekit.errors import ConfigError
from prunekit.formatting import printable

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_TERMINATED = 1, 2, 143
"""Exit codes: any other failure; bad input (nothing was written); SIGTERM. Other signals: 128 more
than their number."""

MESSAGES = "PRUNEKIT_MESSAGES"
"""Variable with the folder in which ranks leave their errors for the process that started them."""

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
"""Type of the repeatable option ``--set KEY=VALUE``."""
Switch = Annotated[bool, Parameter(negative=(), show_default=False)]
"""Type of a flag that has no ``--no-`` form."""


Json = Annotated[bool, Parameter(name="--json", negative=(), show_default=False)]
"""Type of the flag of commands that can print JSON."""


def check_at_least(least: int, option: str, number: int | None) -> None:
    """Check the lower bound of an integer option.

    Args:
        least: Smallest allowed value.
        option: Name of the option, for the message.
        number: Value of the option; None if it was not given.

    Raises:
        ConfigError: The value is below the bound.
    """
    if number is not None and number < least:
        raise ConfigError(f"{option} {number}: must be at least {least}.")


def print_table(renderable: object) -> None:
    """Print a rich renderable to standard output."""
    from prunekit.cli.console import console

    console().print(renderable)


def print_line(text: str) -> None:
    """Print plain text and a newline to standard output."""
    sys.stdout.write(f"{printable(text)}\n")


def print_json(value: object) -> None:
    """Print a value as JSON to standard output, for programs."""
    from prunekit.formatting import json_text

    sys.stdout.write(f"{json_text(value)}\n")


def report_error(code: int, message: object) -> int:
    """Print an error to standard error, with the rank unless 0.

    Ranks of ``--gpus`` leave it to the process that started them, which prints it once for all.

    Returns:
        The exit code ``code``.
    """
    rank, text = os.environ.get("RANK", "0"), printable(str(message))
    if folder := os.environ.get(MESSAGES):
        Path(folder, rank).write_text(text)
    else:
        sys.stderr.write(f"{text}\n" if rank == "0" else f"Rank {rank}: {text}\n")
    return code
