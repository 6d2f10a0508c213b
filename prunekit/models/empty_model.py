"""Build models and checkpoint outlines from ``config.json`` without reading weights."""

import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from prunekit.checkpoint.header import TensorEntry
from prunekit.checkpoint.reader import Checkpoint
from prunekit.checkpoint.weight_files import WEIGHTS_FILE, read_config
from prunekit.errors import CheckpointError
from prunekit.models import stock
from prunekit.models.computed import fill_computed
from prunekit.models.experts import unfuse
from prunekit.models.hf_config import call_transformers, config_and_class
from prunekit.models.units.removal import restore


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the model that ``config.json`` describes on the meta device.

    Removed units are absent from it, and fused experts are replaced by linears. Buffers that no
    checkpoint stores (rotary frequencies) have real values.

    Raises:
        CheckpointError: transformers does not support the model without custom code, or it cannot
            build a model from the config.
    """
    config, model_class = config_and_class(checkpoint)

    def build() -> PreTrainedModel:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = stock.build_model(config, torch.float32).eval()
            if model_class:
                restore(model)
            return model

    model = call_transformers(checkpoint, "cannot build the model from it", build)
    fill_computed(model)
    unfuse(model)
    return model


def has_weights(folder: Path) -> bool:
    """Return whether a folder contains weight files of any format."""
    return any(path.suffix in {".safetensors", ".bin", ".pt", ".pth"} for path in folder.iterdir())


def checkpoint_from_config(folder: Path) -> Checkpoint:
    """Return the names, shapes and dtypes that ``config.json`` alone implies.

    Raises:
        CheckpointError: The model cannot be built (see :func:`empty_model`), or its dtype is not
            float32, float16 or bfloat16.
    """
    config = read_config(folder)
    model = empty_model(Checkpoint(folder, config, {}, {}))
    dtype_name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype_name not in {"float32", "float16", "bfloat16"}:
        raise CheckpointError(f"{folder / 'config.json'}: dtype {dtype_name!r} cannot be planned.")
    dtype, tied = getattr(torch, dtype_name), getattr(model, "all_tied_weights_keys", {})
    entries = {
        name: TensorEntry(
            folder / WEIGHTS_FILE, dtype, tuple(value.shape), value.numel() * dtype.itemsize
        )
        for name, value in model.state_dict().items()
        if name not in tied
    }
    return Checkpoint(folder, config, entries, entries)


def max_tokens(model: PreTrainedModel) -> int:
    """Return the maximum sequence length; ``sys.maxsize`` without a limit."""
    names = [model.config, *stock.config_parts(model.config.get_text_config())]
    entries = ("max_position_embeddings", "max_target_positions")
    limits = (stock.config_value(config, entry) for config in names for entry in entries)
    limit = next(filter(None, limits), sys.maxsize)
    token_embedding = model.get_input_embeddings()
    for module in model.modules():
        # RoBERTa numbers positions from the row after its padding row.
        if not isinstance(module, nn.Embedding) or module is token_embedding:
            continue
        if module.num_embeddings == limit and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit
