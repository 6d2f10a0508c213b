"""The table of data and tasks measured before and after."""

import os
import re
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from prunekit.config.messages import MisplacedError
from prunekit.config.tables import Labelled, Listed, Sources, absolute_path
from prunekit.config.toml_source import quoted
from prunekit.data.sources import TASK_FILES

TASK_NAME = re.compile(r"[\w.+-]+")
"""Names of tasks of lm-eval."""


def _parse_task_name(name: str, info: ValidationInfo) -> str:
    """Return a task of lm-eval, with the path of a file absolute."""
    if name.endswith(TASK_FILES):
        name = absolute_path(name, info)
        if not os.path.isfile(name):  # noqa: PTH113  does not raise on invalid file names
            raise ValueError(f"{name}: no such file.")
    elif not TASK_NAME.fullmatch(name):
        raise ValueError(
            f'{quoted(name)} is no task: write a name such as "arc_easy", or a file that ends in '
            f"{TASK_FILES[0]}."
        )
    return name


class Evaluate(Labelled):
    """Text, labelled data or tasks that are measured before and after.

    Measured are, of classification, accuracy and loss; of seq2seq, exact match and loss.
    """

    data: Sources = Field(default=[])
    """Text other than the calibration text: files (.txt, .jsonl, .jsonl.gz, .parquet), pydoc:test,
    hub:NAME:SPLIT. With task: files (.tsv, .csv, .jsonl, .jsonl.gz, .parquet) or
    hub:NAME:SPLIT."""
    length: int = Field(default=2048, ge=2)
    """Tokens per window, with task at most; capped at the model's context length."""
    windows: int | None = Field(default=None, ge=1)
    """Number of windows from the start of the text. Default: all."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens from the start of a window to that of the next; only tokens that the window before
    does not have are predicted. Default: as long as a window, so that none overlap."""
    samples: int | None = Field(default=None, ge=1)
    """With task: number of rows from the start of each file. Default: all."""
    tasks: Annotated[list[Annotated[str, AfterValidator(_parse_task_name)]], Listed] = Field(
        default=[], validate_default=True
    )
    """Tasks of lm-eval (pip install 'prunekit[harness]'), beside data or instead of it: names of
    tasks, groups or tags, whose data sets come from the hub, or files of your own (.yaml), whose
    functions run. The whole model runs, and is spread over all memory where it is larger than the
    device."""
    few_shot: int | None = Field(default=None, ge=0)
    """With tasks: solved examples before each question. Default: as the task defines."""
    limit: int | None = Field(default=None, ge=1)
    """With tasks: number of questions from the start of each task. Default: all."""

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: list[str], info: ValidationInfo) -> list[str]:
        if not tasks and info.data.get("data") == []:
            raise MisplacedError({("evaluate", "data"): "missing. Name texts, or set tasks."})
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task is listed twice.")
        return tasks

    @field_validator("few_shot", "limit")
    @classmethod
    def _check_asked(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count is not None and info.data.get("tasks") == []:
            raise ValueError("is a setting of tasks, and there are none.")
        return count

    @field_validator("windows", "stride", "samples")
    @classmethod
    def _check_count(cls, count: int | None, info: ValidationInfo) -> int | None:
        labelled = info.data.get("task") is not None
        if count is not None and labelled and info.field_name != "samples":
            raise ValueError("rows have no windows; write samples, or leave it out.")
        if count is not None and info.data.get("data") == []:
            raise ValueError("is a setting of data, and there are none.")
        length = info.data.get("length")
        if count is not None and info.field_name == "stride" and length and count > length:
            raise ValueError(
                f"{count} is more than the {length} tokens of a window: text between windows would "
                "be left out. Write at most length."
            )
        if count is not None and not labelled and info.field_name == "samples":
            raise ValueError("counts rows of labelled data; write windows, or set task.")
        return count
