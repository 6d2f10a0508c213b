"""TODO-DOC prunekit/training/lora.py (out of prunekit/training.py)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunekit.errors import ConfigError
from prunekit.inference.sparse_linear import SparseLinear


@torch.no_grad()
def merge_low_rank(
    layer: nn.Module,
    down: Float[Tensor, "R I"],
    up: Float[Tensor, "O R"],
    scale: float = 1.0,
) -> None:
    """Add ``scale · up · down`` to a linear layer's weight, in place, where it is not zero.

    What the adapter would have put in place of zeros is lost, so a merged model answers a little
    differently from the model with its adapter beside it.

    Args:
        layer: Linear, Conv1D or sparse; in a sparse one the stored values change, no bits.
        down: The adapter's first factor (``lora_A``).
        up: Its second (``lora_B``).
        scale: Alpha over rank, usually.
    """
    _add_where_kept(layer, scale * (up.float() @ down.float()))


@torch.no_grad()
def merge_adapters(model: nn.Module, adapter: str = "default") -> nn.Module:
    """Merge a LoRA adapter of ``peft`` into a pruned model under its masks; return the bare model.

    ``merge_and_unload`` of peft itself would fill the zeros.

    Args:
        model: What ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` returned.
        adapter: Its name.

    Raises:
        ConfigError: The model has no such adapter, or one that no sum can stand for; nothing is
            changed.
    """
    kinds = "lora_A", "lora_embedding_A"
    adapted: list[Any] = [
        module
        for module in model.modules()
        if any(adapter in getattr(module, kind, {}) for kind in kinds)
    ]
    if not adapted:
        raise ConfigError(f"merge_adapters: the model has no LoRA adapter {adapter!r}.")
    for module in adapted:
        if (
            module.merged
            or module.lora_bias.get(adapter)
            or adapter in getattr(module, "lora_variant", {})
        ):
            raise ConfigError(
                f"merge_adapters: {adapter!r} has been merged by peft, or is more than a product "
                "of two matrices (DoRA, biases), which cannot be added under masks."
            )
    for module in adapted:
        delta, base = module.get_delta_weight(adapter), module.base_layer
        _add_where_kept(base, delta.T if isinstance(base, Conv1D) else delta)
    return model.unload()  # pyright: ignore  of PeftModel


def _add_where_kept(layer: nn.Module, delta: Float[Tensor, "O I"]) -> None:
    if isinstance(layer, SparseLinear):
        layer.set_kept(layer.dense().float() + delta)
        return
    weight: Tensor = layer.weight  # pyright: ignore
    delta = delta.T if isinstance(layer, Conv1D) else delta
    weight.copy_((weight.float() + delta) * (weight != 0))
