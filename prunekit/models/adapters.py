"""Low-rank adapters of peft as parts of the linears that they adapt.

A linear with adapters multiplies by W + Σ s B A. A row of W and one of each B make up an output; a
column of W and one of each A belong to an input.

Shapes: O output features, I input features, R rank of an adapter.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.architectures.adapters import adapter_layers, base_layer, is_adapter_layer
from prunekit.errors import ConfigError
from prunekit.models.in_memory import is_distributed, whole_tensor
from prunekit.models.orientation import outputs_first, update_features, weight_matrix

LORA_LAYERS = "peft.tuners.lora.layer"
"""Module of peft that defines the layers of LoRA."""


def output_parts(linear: nn.Module) -> list[Any]:
    """Return the linears with a row per output: W, each B."""
    return [base_layer(linear), *_factors(linear, "lora_B")]


def input_parts(linear: nn.Module) -> list[Any]:
    """Return the linears with a column per input: W, each A."""
    return [base_layer(linear), *_factors(linear, "lora_A")]


def effective_weight(linear: nn.Module) -> Float[Tensor, "O I"]:
    """Return the weight that a linear multiplies by, with its active adapters.

    All processes have to call it alike if FSDP 2 shards the weight.
    """
    weight = weight_matrix(linear).detach()
    layer: Any = linear
    if not _is_low_rank(layer):
        return whole_tensor(weight)
    active = [] if layer.disable_adapters else layer.active_adapters
    added = [name for name in active if name in layer.lora_A and name not in layer.merged_adapters]
    for name in added:
        product = outputs_first(layer, layer.get_delta_weight(name).detach())
        masked = is_masked(layer, name)
        weight = weight + (product * (weight_matrix(linear) != 0) if masked else product)
    return whole_tensor(weight)


@torch.no_grad()
def assign_weight(linear: nn.Module, weight: Float[Tensor, "O I"]) -> None:
    """Set the weight that a linear multiplies by, in place.

    Adapters are not changed: what differs is added to the linear's own weight. Where the new weight
    is zero the own one becomes zero, so the adapters have to be masked.
    """
    stored = weight_matrix(linear)
    weight = weight.to(stored.device)
    if _is_low_rank(linear):
        before = effective_weight(linear).to(weight.dtype)
        weight = torch.where(weight != 0, stored + (weight - before), 0)
    stored.copy_(weight)


def check_low_rank(linear: nn.Module, name: str) -> None:
    """Refuse a linear whose adapters are not products of two matrices.

    Args:
        linear: The linear, with or without adapters.
        name: Its name, or that of its units, for the message.

    Raises:
        ConfigError: It is trained as a copy, quantized, or adapted in another way than by LoRA.
    """
    if is_adapter_layer(linear) and (reason := why_not_low_rank(linear)):
        raise ConfigError(
            f"{name}: {reason}, so no part of it belongs to one unit. Merge or unload the adapter "
            "first."
        )


def is_masked(layer: Any, adapter: str) -> bool:  # noqa: ANN401  a class of peft
    """Return whether an adapter is masked where the weight is zero."""
    return getattr(layer.lora_variant.get(adapter), "masks_product", False)


def all_masked(layer: Any) -> bool:  # noqa: ANN401  a class of peft
    """Return whether no adapter adds to weights that are zero."""
    if "base_layer" not in layer._modules:
        return True  # it is trained as a copy
    adapters = [*getattr(layer, "lora_A", ()), *getattr(layer, "lora_embedding_A", ())]
    masked = _is_low_rank(layer) and all(is_masked(layer, adapter) for adapter in adapters)
    return masked and not layer.merged_adapters


def why_not_low_rank(layer: Any, adapter: str | None = None) -> str | None:  # noqa: ANN401
    """Return why an adapter layer is no plain LoRA linear, or None.

    None if it is one.

    Args:
        layer: The adapter layer.
        adapter: The adapter; None for all.
    """
    if not _is_low_rank(layer):
        return f"its adapter is a {type(layer).__name__} of peft, no LoRA of a linear"
    weight: Any = base_layer(layer).weight
    plain = type(weight.data) is Tensor or is_distributed(weight.data)
    if not plain or not weight.is_floating_point():
        return f"its weight is quantized ({type(base_layer(layer)).__name__})"
    for name, variant in layer.lora_variant.items():
        if variant and adapter in {None, name} and not is_masked(layer, name):
            return f"its adapter {name!r} is more than a product of two matrices (DoRA …)"
    return None


def update_adapter_features(model: nn.Module) -> None:
    """Set the feature counts of all adapter layers by their weights."""
    layers: dict[str, Any] = adapter_layers(model)
    for layer in layers.values():
        if isinstance(table := base_layer(layer), nn.Embedding):
            layer.in_features, layer.out_features = table.weight.shape
        elif _is_low_rank(layer):
            for linear in (layer, *_factors(layer, "lora_A"), *_factors(layer, "lora_B")):
                update_features(linear)


def _is_low_rank(module: nn.Module) -> bool:
    """Return whether a layer applies its adapters by ``lora_variant``."""
    kind = type(module)
    return kind.__module__ == LORA_LAYERS and kind.__name__ in {"Linear", "Embedding"}


def _factors(linear: nn.Module, name: str) -> list[Any]:
    found = linear._modules.get(name) if is_adapter_layer(linear) else None
    return [] if found is None else [*cast("nn.ModuleDict", found).values()]
