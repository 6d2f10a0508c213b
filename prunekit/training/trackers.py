"""Experiment trackers that follow a training: those of accelerate, by their names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError

KEY = "train.log_with"
"""Key of the config that names trackers."""
Log = Callable[[int, Mapping[str, Any]], None]
"""Logs the facts of a step."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are known to accelerate, and their packages installed.

    Raises:
        ConfigError: One is not.
    """
    built_in = {str(each) for each in LoggerType} - {"all"}
    missing = built_in - {str(each) for each in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f'{KEY}: "{name}" is not a tracker of accelerate. Choose: {known}.')
        if name in missing:
            package = name.replace("_", "-")
            raise ConfigError(f'{KEY}: "{name}" needs its package: pip install {package}.')


@contextmanager
def trackers(
    names: Sequence[str],
    run: str,
    folder: Path,
    settings: Mapping[str, Any],
    ranks: Ranks = SINGLE,
) -> Iterator[Log]:
    """Start trackers on rank 0, and finish them afterwards.

    Args:
        names: Names of the trackers; see :func:`check_trackers`.
        run: Name of the run, or of the project, as the tracker has it.
        folder: Gets the files of trackers that write files.
        settings: Settings of the run, in tables that may be nested.
        ranks: Processes that share the run.

    Yields:
        A function that logs facts; None, and what is not a number or text, is left out.

    Raises:
        ConfigError: A tracker cannot be started; raised by all ranks.
    """
    with ExitStack() as stack:
        started: list[GeneralTracker] = []
        ranks.run_on_main(lambda: _start(names, run, folder, settings, started, stack))

        def log(step: int, facts: Mapping[str, Any]) -> None:
            for each in started:
                each.log(_flat(facts), step=step)

        yield log


def _start(
    names: Sequence[str],
    run: str,
    folder: Path,
    settings: Mapping[str, Any],
    started: list[GeneralTracker],
    stack: ExitStack,
) -> None:
    """Start trackers, adding each to ``started``, and to ``stack`` for its end."""
    check_trackers(names)
    if names:
        PartialState()  # the trackers' log messages need it
    for name in dict.fromkeys(names):
        kind = LOGGER_TYPE_TO_CLASS[name]
        try:
            tracker = kind(run, folder) if kind.requires_logging_directory else kind(run)
            # accelerate before 1.8 starts trackers as they are made.
            getattr(tracker, "start", lambda: None)()
            tracker.store_init_configuration(_flat(settings))
        except Exception as error:  # a class of its own in each package
            reason = str(error) or type(error).__name__
            raise ConfigError(f'{KEY}: "{name}" cannot be started: {reason}') from error
        stack.callback(tracker.finish)
        started.append(tracker)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, float | str]:
    """Return the numbers and texts of nested tables, by names with slashes."""
    found = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float | str):
            found[f"{prefix}{name}"] = value
    return found
