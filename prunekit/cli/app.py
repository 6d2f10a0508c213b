"""The cyclopts application, its exit codes, and output shared by commands."""

import os
import sys
import traceback
from collections.abc import Sequence
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
    help_epilogue="Every command also takes --no-color (as NO_COLOR does) and --verbose: layers as "
    "they are pruned, and the traceback of an error.",
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


VERBOSE = "PRUNEKIT_VERBOSE"
"""Variable that stands for --verbose, also in processes that a command starts."""
GLOBAL_OPTIONS = {"--verbose": VERBOSE, "--no-color": "NO_COLOR"}
"""Options of every command, as variables of the environment."""


def without_global_options(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command; options of every command are set."""
    for option in GLOBAL_OPTIONS.keys() & {*arguments}:
        os.environ[GLOBAL_OPTIONS[option]] = "1"
    return [each for each in arguments if each not in GLOBAL_OPTIONS]


def is_verbose() -> bool:
    """Return whether --verbose was given."""
    return bool(os.environ.get(VERBOSE))


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
    if is_verbose() and isinstance(message, Exception):
        text = printable("".join(traceback.format_exception(message)).rstrip())
    if folder := os.environ.get(MESSAGES):
        Path(folder, rank).write_text(text)
    else:
        sys.stderr.write(f"{text}\n" if rank == "0" else f"Rank {rank}: {text}\n")
    return code
