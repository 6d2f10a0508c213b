"""Tables that every run has: ``[model]``, ``[calibration]``, ``[output]``; their common keys.

The docstring of each field is its documentation for users: ``prunekit schema`` shows it.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from typing_extensions import override

from prunekit.checkpoint.output_path import MAX_SHARD_BYTES
from prunekit.config.toml_source import quoted
from prunekit.data import sources
from prunekit.data.labelled import COLUMNS, TABLES, Task, check_labelled_sources
from prunekit.formatting import parse_bytes
from prunekit.models.devices import DEVICE_PATTERN

MOST_STEPS = 1_000_000
"""Steps of pruning or training, of which a run could not do more in years."""
NAME_BYTES = 255
"""Longest name of a file or folder on usual file systems."""
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def absolute_path(path: str, info: ValidationInfo) -> str:
    """Return the absolute path; relative paths start at the config file's folder.

    Raises:
        ValueError: No file can have this name.
    """
    folder = (info.context or {}).get("folder", Path())
    try:
        absolute = os.path.normpath(folder.absolute() / Path(path).expanduser())
    except RuntimeError:
        raise ValueError(f"{quoted(path)}: there is no such user.") from None
    if not path:
        raise ValueError('"" is not a path.')
    if "\0" in path or any(len(os.fsencode(name)) > NAME_BYTES for name in Path(absolute).parts):
        raise ValueError(
            f"{quoted(path)}: no file has such a name; names have up to {NAME_BYTES} bytes."
        )
    return absolute


def _parse_source(source: str, info: ValidationInfo) -> str:
    if not source.startswith(("pydoc:", "hub:")):
        source = absolute_path(source, info)
    if "task" not in info.data:
        return source  # its mistake is reported, and decides which sources are allowed
    if info.data["task"] is None and source.endswith(TABLES):
        raise ValueError(f"{source}: holds labelled rows; set task to {' or '.join(COLUMNS)}.")
    check = check_labelled_sources if info.data["task"] else sources.check_sources
    if problems := check([source]):
        raise ValueError(f"{problems[0]}.")
    return source


def _parse_source_or_self(source: str, info: ValidationInfo) -> str:
    if source != sources.SELF:
        return _parse_source(source, info)
    if info.data.get("task"):
        raise ValueError(f'"{source}" has no labels; name files, or leave out task.')
    return source


def as_list(value: object) -> object:
    """Wrap a string in a list; return other values unchanged."""
    return [value] if isinstance(value, str) else value


def _parse_size(value: object) -> object:
    """Return the bytes of a size in words; return other values unchanged."""
    if not isinstance(value, str):
        return value
    if not (found := parse_bytes(value)):
        raise ValueError(f'{quoted(value)} is no size. Write a number with a unit, such as "5GB".')
    return found


Listed = BeforeValidator(as_list, json_schema_input_type=str | list[str])
Size = Annotated[int, BeforeValidator(_parse_size, json_schema_input_type=int | str), Field(ge=1)]
"""Bytes, as a number or with a unit."""
Sources = Annotated[
    list[Annotated[str, AfterValidator(_parse_source)]], Listed, Field(min_length=1)
]
SourcesOrSelf = Annotated[
    list[Annotated[str, AfterValidator(_parse_source_or_self)]], Listed, Field(min_length=1)
]


class Section(BaseModel):
    """Base class of the config's tables: frozen, unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
    )

    @override
    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yield the values that are not the defaults."""
        for name, value in super().__repr_args__():
            field = type(self).model_fields.get(name or "")
            if field is None or value != field.default:
                yield name, value


class Model(Section):
    """The model to prune."""

    path: str
    """Folder of a Hugging Face checkpoint, or its id on the hub."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    part: Literal["language", "vision", "all"] = "language"
    """Part of a model of images and text that is pruned; what joins its towers to the text stays
    dense. Another model is language."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Data type in which the model runs; auto: as stored."""
    device: str = "auto"
    """Device on which the model runs: cpu, cuda or cuda:0; auto: the GPU if there is one."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of each process on the CPU. Default: the processors that its affinity and its control
    group (cpu.max) leave it, or OMP_NUM_THREADS."""

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str, info: ValidationInfo) -> str:
        folder = absolute_path(path, info)
        if os.path.isdir(folder):  # noqa: PTH112  does not raise on invalid file names
            return folder
        if HUB_ID.fullmatch(path):
            return path
        raise ValueError(f"{folder}: no such folder, and not a hub id such as Qwen/Qwen3-0.6B.")

    @field_validator("revision")
    @classmethod
    def _check_revision(cls, revision: str, info: ValidationInfo) -> str:
        if Path(path := info.data.get("path", "")).is_absolute():
            raise ValueError(f"{path} is a local folder and has no revisions.")
        return revision

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        if not DEVICE_PATTERN.fullmatch(device):
            raise ValueError(f'"{device}" is not a device. Choose: auto, cpu, cuda, cuda:0.')
        return device


class Labelled(Section):
    """Keys of tables that name texts, with or without labels."""

    task: Task | None = None
    """Labels of the data, if it has any. classification: rows with the columns text (or sentence)
    and label, and pair for a second text; a label is the number of a class, or its name in the
    model's config.json. seq2seq: rows with the columns input and target. Each row is one sample."""
    columns: dict[str, str] | None = None
    """Names of columns that differ from those of the task: {label = "gold"}."""

    @field_validator("columns")
    @classmethod
    def _check_columns(
        cls, columns: dict[str, str] | None, info: ValidationInfo
    ) -> dict[str, str] | None:
        task = info.data.get("task")
        if columns and task is None and "task" in info.data:
            raise ValueError("names columns of labelled data; set task.")
        known = COLUMNS[task] if task else columns or {}
        for column in columns or {}:
            if column not in known:
                raise ValueError(
                    f'{quoted(column)} is no column of task "{task}": {", ".join(known)}.'
                )
        return columns


class Calibration(Labelled):
    """Text on which statistics are gathered."""

    data: SourcesOrSelf
    """Calibration text: files (.txt, .jsonl, .jsonl.gz, .parquet), pydoc:train, hub:NAME:SPLIT; or
    self: text that the dense model generates without a prompt, with the whole model in memory. Rows
    of .jsonl files for a model that reads images may have the key image: a path relative to the
    file, a list of these, or null; for an encoder of log-mel features, as Whisper's, the key audio:
    a .npy or .wav file. With task: files (.tsv, .csv, .jsonl, .jsonl.gz, .parquet) or
    hub:NAME:SPLIT."""
    samples: int = Field(default=128, ge=1)
    """Number of sequences sampled from the text, or of rows with task."""
    length: int = Field(default=2048, ge=1)
    """Tokens per sequence, with task at most; capped at the model's context length."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampling."""
    hidden: Literal["auto", "device", "host", "disk"] = "auto"
    """Where the hidden states between blocks are stored: on the device, in main memory, or in a
    file in the output folder; auto: the fastest of these in which they fit. The result does not
    depend on it."""

    @field_validator("data")
    @classmethod
    def _check_data(cls, data: list[str]) -> list[str]:
        if sources.SELF in data and len(data) > 1:
            raise ValueError(f'"{sources.SELF}" cannot be combined; remove the other texts.')
        return data

    @property
    def self_generated(self) -> bool:
        """Whether the dense model generates the text."""
        return self.data == [sources.SELF]

    def rows_of(self, holds: Callable[[str], bool]) -> list[str]:
        """Return entries of ``data`` that hold rows of a kind.

        Args:
            holds: Tells whether an entry does.
        """
        return [] if self.task or self.self_generated else [*filter(holds, self.data)]


class Output(Section):
    """The pruned checkpoint."""

    path: Annotated[str, AfterValidator(absolute_path)]
    """Folder for the checkpoint, its report and its journal."""
    format: Literal["dense", "2:4", "bitmask"] = "dense"
    """Storage format of the weights. dense: zeros included, readable by every tool. 2:4 (for
    patterns 2:4 and 1:4) and bitmask (for any pattern): smaller; transformers reads them only where
    prunekit is installed."""
    quantize: Literal["int8", "fp8", "int4"] | None = None
    """Round the weights that are kept to so few bits; zeros stay zeros. With [calibration] each
    column makes up for the rounding of those before (mask-aware GPTQ), without it each weight is
    rounded to the nearest value. vLLM and transformers open the result through the library
    compressed-tensors. Scales: one for each output, of int4 one for each 128, 64 or 32 inputs."""
    push: str | None = None
    """Repository on the Hugging Face hub, such as "org/name", to which the finished checkpoint is
    uploaded; needs a login: hf auth login."""
    max_shard_size: Size = MAX_SHARD_BYTES
    """Size of a weight file at most, such as "5GB"; a model that fits is one model.safetensors. So
    much of the disk is needed beside the checkpoint while its files are written."""
