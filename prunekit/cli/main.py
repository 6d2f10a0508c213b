"""Entry point of the command line: one command in, one exit code out."""

from collections.abc import Sequence

from cyclopts import CycloptsError

from prunekit.cli import commands, run  # noqa: F401  registers the commands
from prunekit.cli.app import FAILED, REFUSED, STOPPED, app, fail
from prunekit.errors import CapacityError, CheckpointError, ConfigError, PrunekitError, ShapeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command and return its exit code; unexpected errors pass with their traceback.

    Args:
        arguments: Those of the process if None.
    """
    try:
        return app(arguments) or 0
    except CycloptsError as error:
        return fail(REFUSED, f"{error}\nFor help: prunekit --help")
    except (ConfigError, CheckpointError, ShapeError, CapacityError) as error:
        return fail(REFUSED, error)
    except PrunekitError as error:
        return fail(FAILED, error)
    except KeyboardInterrupt:
        return fail(STOPPED, "Stopped.")
