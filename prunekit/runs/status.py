"""The status of a run, a file made from its records."""

import json
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prunekit.checkpoint.atomic import json_bytes, report_full_disk, temporary_file
from prunekit.checkpoint.journal import JOURNAL, is_locked
from prunekit.errors import CheckpointError, ConfigError, StoppedError
from prunekit.runs.record import Record
from prunekit.runs.stage import Stage

STATUS = "status.json"
"""File of an output folder that says in which stage its run is."""
SECONDS = 1.0
"""Time between two writes of the file within a stage."""


@dataclass(frozen=True)
class Status:
    """Where a run is.

    Attributes:
        stage: Its stage.
        task: What it does there, such as ``rank heads``.
        done: Finished steps of the task.
        steps: Steps of the task; 0 where they are not known.
        seconds: Time since the run began or was resumed.
        error: Why it failed or stopped; None for others.
    """

    stage: Stage = Stage.IDLE
    task: str = ""
    done: int = 0
    steps: int = 0
    seconds: float = 0.0
    error: str | None = None

    @property
    def progress(self) -> float | None:
        """Finished fraction of the task, 0 to 1; None where it is not known."""
        if self.stage is Stage.COMPLETE:
            return 1.0
        return min(1.0, self.done / self.steps) if self.steps else None

    def as_dict(self) -> dict[str, Any]:
        """Return the status with title and progress, as JSON has it."""
        values = asdict(self) | {"stage": self.stage.value}
        return {**values, "title": self.stage.title, "progress": self.progress}


class StatusFile:
    """Follows the records of a run and writes its status.

    Args:
        folder: The output folder.
        writes: This process writes the file; others only follow.
    """

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self.status, self._file, self._writes = Status(), folder / STATUS, writes
        self._began, self._written = time.monotonic(), 0.0

    def follow(self, record: Record) -> None:
        """Update the status from one record.

        Raises:
            ValueError: The stage cannot follow the one before.
        """
        values, now = record.values, self.status
        if record.stage is not None:
            self._set(record.stage, task=record.name, steps=int(values.get("steps", 0)))
        elif record.kind == "step":
            done = int(values.get("done", now.done + 1))
            self._set(now.stage, task=now.task, done=done, steps=now.steps)
        elif record.kind == "block":
            done = int(values["index"]) + 1
            self._set(now.stage, task=now.task, done=done, steps=now.steps)

    def end(self, error: BaseException | None) -> None:
        """Note how the run ended, unless it did not begin."""
        if self.status.stage is Stage.IDLE:
            return
        if error is None:
            self._set(Stage.COMPLETE)
        elif isinstance(error, StoppedError | GeneratorExit | KeyboardInterrupt):
            self._set(Stage.STOPPED, error="stopped as asked; continue it with --resume")
        else:
            self._set(Stage.FAILED, error=str(error) or type(error).__name__)

    def _set(self, stage: Stage, **values: Any) -> None:  # noqa: ANN401
        before = self.status.stage
        if stage not in {before, *before.next}:
            raise ValueError(f"a run that is {before.value} cannot become {stage.value}")
        seconds = time.monotonic() - self._began
        self.status = Status(stage, seconds=round(seconds, 1), **values)
        if stage is before and seconds - self._written < SECONDS:
            return
        self._written = seconds
        if self._writes:
            with report_full_disk(self._file.parent):
                temporary = temporary_file(self._file)
                temporary.write_bytes(json_bytes(self.status.as_dict()))
                temporary.replace(self._file)


def followed(
    records: Generator[Record, None, None], folder: Path, *, writes: bool
) -> Generator[Record, None, None]:
    """Yield a run's records and keep its status in a file.

    Args:
        records: The records.
        folder: The output folder, which exists once there is a first record.
        writes: This process writes the file.
    """
    file = StatusFile(folder, writes=writes)
    try:
        with closing(records):
            for record in records:
                file.follow(record)
                yield record
    except BaseException as error:
        file.end(error)
        raise
    file.end(None)


def read_status(folder: Path) -> Status:
    """Return where the run of a folder is.

    One that was killed left no word of it: it is stopped, as nobody holds its journal. One that is
    resumed or begun anew holds it before its first record: the end that the file tells is that of
    the run before.

    Raises:
        ConfigError: The folder holds no run.
        CheckpointError: The file is damaged.
    """
    file = folder / STATUS
    if not file.is_file():
        if not (folder / JOURNAL).is_file():
            raise ConfigError(f"{folder}: holds no run. Give the output folder of `prunekit run`.")
        return Status()
    try:
        values = json.loads(file.read_bytes())
        keys: dict[str, Any] = {key: values[key] for key in Status.__dataclass_fields__}
        status = Status(**{**keys, "stage": Stage(values["stage"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: is damaged ({error}). Run again with --resume.") from None
    if is_locked(folder / JOURNAL):
        return Status() if status.stage.ended else status
    if status.stage.ended:
        return status
    error = f"was killed while {status.stage.value}; continue it with --resume"
    return replace(status, stage=Stage.STOPPED, error=error)
