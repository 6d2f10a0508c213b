"""TODO-DOC prunekit/models/empty_model.py (out of prunekit/loading.py)."""

import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModel, PreTrainedModel

from prunekit.checkpoint.header import Entry
from prunekit.checkpoint.reader import SINGLE, Checkpoint, read_config
from prunekit.errors import CheckpointError
from prunekit.models.experts import unfuse
from prunekit.models.hf_config import described, understood
from prunekit.models.units.removal import restore


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the model that ``config.json`` describes on the meta device: its shape, no weight.

    Where units were taken out, it has what is left of them; fused experts have linears.

    Buffers that no checkpoint stores (rotary frequencies) are real.

    Raises:
        CheckpointError: transformers does not know the model, or only by code that came with it, or
            nothing can be built from what is said of it.
    """
    config, kind = described(checkpoint)

    def build() -> PreTrainedModel:
        with init_empty_weights(include_buffers=False):
            if kind is None:
                return AutoModel.from_config(config, dtype=torch.float32).eval()
            model = kind._from_config(config, dtype=torch.float32).eval()
            restore(model)
            return model

    model = understood(checkpoint, "cannot build the model from it", build)
    unfuse(model)
    return model


def has_weights(folder: Path) -> bool:
    """Say whether a folder has weights of any kind beside its ``config.json``."""
    return any(path.suffix in {".safetensors", ".bin", ".pt", ".pth"} for path in folder.iterdir())


def outline(folder: Path) -> Checkpoint:
    """Return the checkpoint that a ``config.json`` alone describes: names, shapes and types.

    Raises:
        CheckpointError: As :func:`empty_model`.
    """
    config = read_config(folder)
    model = empty_model(Checkpoint(folder, config, {}, {}))
    said = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if said not in {"float32", "float16", "bfloat16"}:
        raise CheckpointError(f"{folder / 'config.json'}: dtype {said!r} cannot be planned.")
    dtype, tied = getattr(torch, said), getattr(model, "all_tied_weights_keys", {})
    entries = {
        name: Entry(folder / SINGLE, dtype, tuple(value.shape), value.numel() * dtype.itemsize)
        for name, value in model.state_dict().items()
        if name not in tied
    }
    return Checkpoint(folder, config, entries, entries)


def longest(model: PreTrainedModel) -> int:
    """Return the most tokens a model takes at once; without a limit, a number beyond any text."""
    limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    words = model.get_input_embeddings()
    for module in model.modules():
        # RoBERTa counts positions from the row after its padding row.
        if not isinstance(module, nn.Embedding) or module is words:
            continue
        if module.num_embeddings == limit and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit
