"""Open processors of images and text, and extractors of features of sound.

Code in a checkpoint never runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoProcessor, ProcessorMixin, processing_utils

from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import ConfigError, is_out_of_memory
from prunekit.models import stock

EXTRACTOR_FILE = "preprocessor_config.json"


def load_processor(checkpoint: Checkpoint) -> Any:  # noqa: ANN401  transformers has no common class
    """Load a checkpoint's processor of images and text.

    Raises:
        ConfigError: There is none, it needs custom code, or its files are damaged.
    """
    try:
        return read_processor(checkpoint.folder)
    except Exception as error:  # processors raise anything
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{checkpoint.folder}: has no processor that can be loaded ({stock.describe(error)}), "
            "which makes inputs of images. Copy its files, such as preprocessor_config.json, "
            "beside the weights, or calibrate on text."
        ) from error


def load_extractor(checkpoint: Checkpoint) -> Any:  # noqa: ANN401  transformers has no common class
    """Load a checkpoint's extractor of sound features; None without one.

    Raises:
        ConfigError: It needs custom code, or its files are damaged.
    """
    if not (checkpoint.folder / EXTRACTOR_FILE).is_file():
        return None
    try:
        return read_extractor(checkpoint.folder)
    except Exception as error:  # as for processors
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{checkpoint.folder / EXTRACTOR_FILE}: no extractor of features can be made of it "
            f"({stock.describe(error)}). Give .npy files of features."
        ) from error


def read_processor(folder: str | Path) -> Any:  # noqa: ANN401  transformers has no common class
    """Load a processor for images and text, without its video part.

    That part alone needs torchvision.

    Raises:
        ValueError: It needs code of the checkpoint, or there is only a part of one.
    """
    with stock.only_stock_code(), _without_videos():
        found = AutoProcessor.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    if not isinstance(found, ProcessorMixin):
        raise ValueError(f"found a {type(found).__name__} alone")  # noqa: TRY004  of the folder
    return found


def read_extractor(folder: str | Path) -> Any:  # noqa: ANN401  transformers has no common class
    """Load the extractor of features of sound of a checkpoint.

    Raises:
        OSError: There is none.
        ValueError: It needs code of the checkpoint.
    """
    with stock.only_stock_code():
        return AutoFeatureExtractor.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )


class _NoVideos:
    """Stands for the class of the part for videos."""

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> None:
        """Return no part."""


@contextmanager
def _without_videos() -> Iterator[None]:
    """Let processors be made without their part for videos."""
    check = ProcessorMixin.check_argument_for_proper_class
    known = processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING
    parts = {name: known[name] for name in known.keys() if "video" not in name}  # noqa: SIM118

    def checked(self: ProcessorMixin, argument_name: str, argument: Any) -> Any:  # noqa: ANN401
        if argument is None and "video" in argument_name:
            return type(None)
        return check(self, argument_name, argument)

    ProcessorMixin.check_argument_for_proper_class = checked
    processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING = {**parts, "video_processor": _NoVideos}
    try:
        yield
    finally:
        ProcessorMixin.check_argument_for_proper_class = check
        processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING = known
