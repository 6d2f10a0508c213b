"""Merge LoRA adapters into pruned weights without filling their zeros.

Shapes: O output features, I input features, R rank of an adapter.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.inference.sparse_linear import SparseLinear
from prunekit.models.orientation import outputs_first, weight_matrix


@torch.no_grad()
def merge_low_rank(
    layer: nn.Module,
    down: Float[Tensor, "R I"],
    up: Float[Tensor, "O R"],
    scale: float = 1.0,
) -> None:
    """Add ``scale · up · down`` to the nonzero weights of a linear layer.

    The weight changes in place. The part of the product at pruned weights is dropped, so the
    outputs of a merged model differ slightly from those of the model with a separate adapter.

    Args:
        layer: Linear, Conv1D or sparse; of a sparse layer the stored values change, not the mask.
        down: The adapter's first factor (``lora_A``).
        up: The adapter's second factor (``lora_B``).
        scale: Usually alpha divided by the rank.
    """
    _add_where_kept(layer, scale * (up.float() @ down.float()))


@torch.no_grad()
def merge_adapters(model: nn.Module, adapter: str = "default") -> nn.Module:
    """Merge a ``peft`` adapter into a pruned model, and return the model.

    Zeros remain zero, whereas ``merge_and_unload`` of peft would fill them.

    Args:
        model: The model returned by ``peft.get_peft_model`` or ``PeftModel.from_pretrained``.
        adapter: Name of the LoRA adapter.

    Raises:
        ConfigError: The model has no such adapter, or one that is not a sum (DoRA, biases, already
            merged). Nothing is changed then.
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
        _add_where_kept(base, outputs_first(base, delta))
    return model.unload()  # pyright: ignore  of PeftModel


def _add_where_kept(layer: nn.Module, delta: Float[Tensor, "O I"]) -> None:
    if isinstance(layer, SparseLinear):
        layer.set_kept(layer.dense().float() + delta)
        return
    weight = weight_matrix(layer)
    weight.copy_((weight.float() + delta) * (weight != 0))
