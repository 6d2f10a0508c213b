"""Checkpoint folders, local or downloaded from the Hugging Face hub."""

from pathlib import Path

from prunekit.errors import CheckpointError

COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
"""Suffixes of the small files beside the weights: tokenizer, generation settings, and so on."""


def checkpoint_folder(path: str, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint, downloaded from the hub if necessary.

    Args:
        path: A local folder or a hub id.
        revision: Branch, tag or commit of a hub id.

    Raises:
        CheckpointError: The folder does not exist, and the hub id cannot be downloaded.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", *(f"*{ending}" for ending in sorted(COMPANION_SUFFIXES))]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{path}: there is no such folder, and it could not be downloaded from the hub either "
            f"({type(error).__name__}). Name a local folder or a hub id that can be reached."
        ) from error
