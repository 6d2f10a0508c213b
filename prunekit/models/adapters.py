"""Low-rank adapters of peft as parts of the linears that they adapt.

A linear with adapters multiplies by W + Σ s B A. A row of W and one of each B make up an output; a
column of W and one of each A belong to an input.

Shapes: O output features, I input features, R rank of an adapter.
"""

from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from prunekit.architectures.adapters import adapter_layers, base_layer, is_adapter_layer
from prunekit.architectures.coverage import LINEAR_TYPES
from prunekit.errors import ConfigError
from prunekit.models.orientation import outputs_first, update_features, weight_matrix


def output_parts(linear: nn.Module) -> list[Any]:
    """Return the linears whose rows make up the outputs: W, and each B."""
    return [base_layer(linear), *_factors(linear, "lora_B")]


def input_parts(linear: nn.Module) -> list[Any]:
    """Return the linears whose columns belong to the inputs: W, and each A."""
    return [base_layer(linear), *_factors(linear, "lora_A")]


def effective_weight(linear: nn.Module) -> Float[Tensor, "O I"]:
    """Return the weight that a linear multiplies by, with its active adapters."""
    weight = weight_matrix(linear).detach()
    if not is_adapter_layer(linear):
        return weight
    layer: Any = linear
    active = [] if layer.disable_adapters else layer.active_adapters
    added = [name for name in active if name in layer.lora_A and name not in layer.merged_adapters]
    for name in added:
        product = outputs_first(layer, layer.get_delta_weight(name).detach())
        masks = getattr(layer.lora_variant.get(name), "masks_product", False)
        weight = weight + (product * (weight_matrix(linear) != 0) if masks else product)
    return weight


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


def why_not_low_rank(layer: Any, adapter: str | None = None) -> str | None:  # noqa: ANN401
    """Return why an adapter layer is no linear with products of two matrices.

    None if it is one.

    Args:
        layer: The adapter layer.
        adapter: The adapter; None for all.
    """
    if "lora_A" not in layer._modules:
        return f"its adapter is a {type(layer).__name__} of peft, no LoRA"
    base = base_layer(layer)
    if isinstance(base, LINEAR_TYPES) and not base.weight.is_floating_point():
        return f"its weight is quantized ({type(base).__name__})"
    for name, variant in layer.lora_variant.items():
        if adapter in {None, name} and not getattr(variant, "masks_product", False):
            return f"its adapter {name!r} is more than a product of two matrices (DoRA …)"
    return None


def update_adapter_features(model: nn.Module) -> None:
    """Set the feature counts of all adapter layers to the shapes of their weights."""
    for layer in adapter_layers(model).values():
        if "lora_A" in layer._modules:
            for linear in (layer, *_factors(layer, "lora_A"), *_factors(layer, "lora_B")):
                update_features(linear)


def _factors(linear: nn.Module, name: str) -> list[Any]:
    found = linear._modules.get(name) if is_adapter_layer(linear) else None
    return [] if found is None else [*cast("nn.ModuleDict", found).values()]
