"""TODO-DOC prunekit/checkpoint/hub.py (out of prunekit/checkpoint.py)."""

from pathlib import Path

from prunekit.errors import CheckpointError

KEPT_ENDINGS = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
"""Small files that belong to a checkpoint (tokenizer, generation settings) beside its weights."""


def find(path: str, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint: ``path`` itself, or a hub id fetched into the hub's cache.

    Raises:
        CheckpointError: There is neither such a folder nor such a repository within reach.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", *(f"*{ending}" for ending in sorted(KEPT_ENDINGS))]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{path}: there is no such folder, and it could not be fetched from the hub either "
            f"({type(error).__name__}). Give a local folder or a hub id that is within reach."
        ) from error
