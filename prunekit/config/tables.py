"""Tables that every run has: ``[model]``, ``[calibration]``, ``[evaluate]``, ``[output]``.

The docstring of each field is its documentation for users: ``prunekit schema`` shows it.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from prunekit.config.toml_source import quoted
from prunekit.data import sources
from prunekit.models.devices import DEVICE_PATTERN

MOST_STEPS = 1_000_000
"""Steps of pruning or training, of which a run could not do more in years."""
NAME_BYTES = 255
"""Longest name of a file or folder on usual file systems."""
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def _absolute_path(path: str, info: ValidationInfo) -> str:
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
        source = _absolute_path(source, info)
    if problems := sources.check_sources([source]):
        raise ValueError(f"{problems[0]}.")
    return source


def _parse_source_or_self(source: str, info: ValidationInfo) -> str:
    return source if source == sources.SELF else _parse_source(source, info)


def as_list(value: object) -> object:
    """Wrap a string in a list; return other values unchanged."""
    return [value] if isinstance(value, str) else value


Listed = BeforeValidator(as_list, json_schema_input_type=str | list[str])
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


class Model(Section):
    """The model to prune."""

    path: str
    """Folder of a Hugging Face checkpoint, or its id on the hub."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Data type in which the model runs; auto: as stored."""
    device: str = "auto"
    """Device on which the model runs: cpu, cuda or cuda:0; auto: the GPU if there is one."""

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str, info: ValidationInfo) -> str:
        folder = _absolute_path(path, info)
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


class Calibration(Section):
    """Text on which statistics are gathered."""

    data: SourcesOrSelf
    """Calibration text: files (.txt, .jsonl, .jsonl.gz, .parquet), pydoc:train, hub:NAME:SPLIT; or
    self: text that the dense model generates without a prompt, with the whole model in memory."""
    samples: int = Field(default=128, ge=1)
    """Number of sequences sampled from the text."""
    length: int = Field(default=2048, ge=1)
    """Tokens per sequence; capped at the model's context length."""
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


class Evaluate(Section):
    """Text on which perplexity is measured before and after."""

    data: Sources
    """Text other than the calibration text: files (.txt, .jsonl, .jsonl.gz, .parquet), pydoc:test,
    hub:NAME:SPLIT."""
    length: int = Field(default=2048, ge=2)
    """Tokens per window; capped at the model's context length."""
    windows: int | None = Field(default=None, ge=1)
    """Number of windows from the start of the text. Default: all."""


class Output(Section):
    """The pruned checkpoint."""

    path: Annotated[str, AfterValidator(_absolute_path)]
    """Folder for the checkpoint, its report and its journal."""
    format: Literal["dense", "2:4", "bitmask"] = "dense"
    """Storage format of the weights. dense: zeros included, readable by every tool. 2:4 (for
    patterns 2:4 and 1:4) and bitmask (for any pattern): smaller; transformers reads them only where
    prunekit is installed."""
