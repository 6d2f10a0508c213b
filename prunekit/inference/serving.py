"""What a server needs to know of a checkpoint: whether it can be served, and how."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.checkpoint.reader import Checkpoint


def convert_command(folder: Path) -> str:
    """Return the command that writes a dense copy of a checkpoint."""
    dense = folder.with_name(f"{folder.absolute().name}-dense")
    return shlex.join(["prunekit", "convert", str(folder), str(dense), "--format", "dense"])


def check_servable(folder: Path) -> Checkpoint:
    """Check by headers that a checkpoint is complete and that a server can hold its model.

    Servers build models with the same number of units in every layer, and most do not notice a
    missing tensor of a quantized model.

    Raises:
        CheckpointError: A tensor is missing or corrupt, or layers keep different numbers of units.
    """
    from prunekit.checkpoint.compressed import KEPT_UNITS_KEY
    from prunekit.checkpoint.reader import open_checkpoint
    from prunekit.errors import CheckpointError
    from prunekit.models.empty_model import empty_model
    from prunekit.models.weight_names import stored_names

    checkpoint = open_checkpoint(folder)
    if KEPT_UNITS_KEY in checkpoint.config:
        raise CheckpointError(
            f"{folder / 'config.json'}: its layers keep different numbers of heads or neurons, "
            "and the model classes of vLLM and SGLang have one number for all. Serve it with "
            "transformers, or prune again with uniform = true in [prune]."
        )
    stored_names(empty_model(checkpoint), checkpoint)
    return checkpoint
