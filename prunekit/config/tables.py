"""The tables of a config; the keys, their checks and their explanations in one place."""

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

from prunekit.data import sources
from prunekit.models.devices import DEVICE

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def _beside(path: str, info: ValidationInfo) -> str:
    """Return ``path`` absolute, seen from the folder of the config file."""
    folder = (info.context or {}).get("folder", Path())
    return os.path.normpath(folder.absolute() / Path(path).expanduser())


def _source(source: str, info: ValidationInfo) -> str:
    if not source.startswith(("pydoc:", "hub:")):
        source = _beside(source, info)
    if problems := sources.check_sources([source]):
        raise ValueError(f"{problems[0]}.")
    return source


def _source_or_self(source: str, info: ValidationInfo) -> str:
    return source if source == sources.SELF else _source(source, info)


def as_list(value: object) -> object:
    """Let one string stand for a list of it."""
    return [value] if isinstance(value, str) else value


Listed = BeforeValidator(as_list, json_schema_input_type=str | list[str])
Sources = Annotated[list[Annotated[str, AfterValidator(_source)]], Listed, Field(min_length=1)]
SourcesOrSelf = Annotated[
    list[Annotated[str, AfterValidator(_source_or_self)]], Listed, Field(min_length=1)
]


class Section(BaseModel):
    """A table of the config: frozen, and a key it does not know is a mistake."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, arbitrary_types_allowed=True
    )


class Model(Section):
    """The model to prune."""

    path: str
    """Folder of a Hugging Face checkpoint, or the id of one on the hub."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Type in which the model runs; auto: as stored."""
    device: str = "auto"
    """Where the model runs: cpu, cuda or cuda:0; auto: the GPU if there is one."""

    @field_validator("path")
    @classmethod
    def _folder_or_hub_id(cls, path: str, info: ValidationInfo) -> str:
        folder = _beside(path, info)
        if os.path.isdir(folder):  # noqa: PTH112  answers also for what no file can be called
            return folder
        if HUB_ID.fullmatch(path):
            return path
        raise ValueError(f"{folder}: no such folder, nor is it a hub id such as Qwen/Qwen3-0.6B.")

    @field_validator("revision")
    @classmethod
    def _of_the_hub(cls, revision: str, info: ValidationInfo) -> str:
        if Path(path := info.data.get("path", "")).is_absolute():
            raise ValueError(f"{path} is a local folder, which has no revisions.")
        return revision

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not DEVICE.fullmatch(device):
            raise ValueError(f'"{device}" is not a device. Choose: auto, cpu, cuda, cuda:0.')
        return device


class Calibration(Section):
    """The text from which statistics are gathered."""

    data: SourcesOrSelf
    """Text on which the method watches the model: files (.txt, .jsonl, .jsonl.gz, .parquet),
    pydoc:train, hub:NAME:SPLIT; or self: what the dense model writes when left to itself, for which
    it is in memory whole."""
    samples: int = Field(default=128, ge=1)
    """Sequences drawn from the text."""
    length: int = Field(default=2048, ge=1)
    """Tokens of a sequence; capped at what the model allows."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draw."""
    hidden: Literal["auto", "device", "host", "disk"] = "auto"
    """Where what the next block reads of the text is kept: on the device, in main memory, or in a
    file beside the output; auto: as near as it fits. It changes no bit of the result."""

    @field_validator("data")
    @classmethod
    def _alone(cls, data: list[str]) -> list[str]:
        if sources.SELF in data and len(data) > 1:
            raise ValueError(f'"{sources.SELF}" goes alone; leave out the other texts.')
        return data

    @property
    def own(self) -> bool:
        """Whether the dense model writes the text."""
        return self.data == [sources.SELF]


class Evaluate(Section):
    """The text on which perplexity is measured, before and after."""

    data: Sources
    """Text that the method has not seen: files (.txt, .jsonl, .jsonl.gz, .parquet), pydoc:test,
    hub:NAME:SPLIT."""
    length: int = Field(default=2048, ge=2)
    """Tokens of a window; capped at what the model allows."""
    windows: int | None = Field(default=None, ge=1)
    """Only the first so many windows; all, unless said."""


class Output(Section):
    """The pruned checkpoint."""

    path: Annotated[str, AfterValidator(_beside)]
    """Folder for the checkpoint, its report and its journal."""
    format: Literal["dense", "2:4", "bitmask"] = "dense"
    """How weights are stored. dense: zeros written out, as every tool reads it. 2:4 (for patterns
    2:4 and 1:4) and bitmask (for any): smaller, and read by transformers only where prunekit is
    installed."""
