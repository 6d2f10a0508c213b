"""Entry point of the command line; maps errors to exit codes."""

import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

from prunekit.cli import (  # noqa: F401  registers the commands
    advise,
    checkpoints,
    commands,
    docs,
    evaluate,
    quantize,
    run,
    serve,
    show,
)
from prunekit.cli.app import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    app,
    report_error,
    without_global_options,
)
from prunekit.cli.signals import StopSignals
from prunekit.errors import CapacityError, CheckpointError, ConfigError, PrunekitError, ShapeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Unexpected exceptions propagate with their traceback.

    Args:
        arguments: Command-line arguments; those of the process if None.
    """
    signals = StopSignals()
    try:
        with signals:
            given = sys.argv[1:] if arguments is None else arguments
            return app(without_global_options(given)) or 0
    except CycloptsError as error:
        return report_error(EXIT_BAD_INPUT, f"{error}\nFor help: prunekit --help")
    except (ConfigError, CheckpointError, ShapeError, CapacityError) as error:
        return report_error(EXIT_BAD_INPUT, error)
    except PrunekitError as error:
        return report_error(EXIT_FAILED, error)
    except OSError as error:
        if error.errno is None:  # not of the system
            raise
        place = f"{error.filename}: " if error.filename else ""
        return report_error(
            EXIT_FAILED, f"{place}{error.strerror}. Mend that, and start the command again."
        )
    except KeyboardInterrupt:
        return report_error(signals.exit_code, "Stopped.")
