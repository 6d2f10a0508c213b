"""Adapters under the masks of the pruned weights that they adapt.

With an adapter s B A beside a pruned weight W, whose kept weights are those that are not zero, the
forward computes the function of the merged weight:

    y = x Wᵀ + s x ((B A) ∘ keep)ᵀ

Shapes: O output features, I input features, R rank of an adapter, T tokens.
"""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from prunekit.architectures.adapters import adapter_layers, bare_model, base_layer
from prunekit.architectures.coverage import LINEAR_TYPES
from prunekit.errors import ConfigError
from prunekit.inference.sparse_linear import SparseLinear
from prunekit.models.adapters import why_not_low_rank
from prunekit.models.orientation import outputs_first, weight_matrix
from prunekit.structured.frozen_units import HookHandles

ADAPTED = (*LINEAR_TYPES, SparseLinear, nn.Embedding)
"""Modules whose adapters can be masked."""


def mask_adapters(model: nn.Module, adapter: str | None = "default") -> "MaskedAdapters":
    """Mask the products of adapters where the adapted weights are zero.

    The forward is then that of the merged model, in training and after it: with
    :func:`prunekit.training.merge_adapters`, and with peft's own merging too. The zeros are looked
    up at each forward, so the masks follow a pruner. This costs a product of the size of the weight
    for each forward and backward, and no memory in between.

    Args:
        model: A model with LoRA adapters of peft.
        adapter: Name of the adapter; None for all.

    Returns:
        The masks, in force until ``remove()`` or the end of a ``with`` block.

    Raises:
        ConfigError: The model has no such adapter, or one that cannot be masked (DoRA, biases, of a
            quantized or convolutional layer, merged already). Nothing is changed then.
    """
    return MaskedAdapters(
        [
            (layer, name)
            for layer, name in masked_layers(model, adapter, "mask_adapters")
            if name not in layer.lora_variant
        ]
    )


def mask_all_adapters(model: nn.Module) -> "MaskedAdapters | None":
    """Mask the adapters of a model, if it has any.

    Raises:
        ConfigError: It has one that cannot be masked.
    """
    return mask_adapters(model, None) if adapter_layers(bare_model(model)) else None


class MaskedAdapters(HookHandles):
    """Masked adapters; made by :func:`mask_adapters`."""

    def __init__(self, adapters: list[tuple[Any, str]]) -> None:
        """Mask each adapter of ``adapters``: layers with adapter names."""
        super().__init__([])
        self._adapters = adapters
        for layer, name in adapters:
            layer.lora_variant[name] = MaskedProduct()

    @override
    def remove(self) -> None:
        for layer, name in self._adapters:
            if isinstance(layer.lora_variant.get(name), MaskedProduct):
                del layer.lora_variant[name]
        self._adapters = []


def masked_layers(model: nn.Module, adapter: str | None, user: str) -> list[tuple[Any, str]]:
    """Return the layers with an adapter, each with its name, checked.

    Args:
        model: A model with LoRA adapters of peft.
        adapter: Name of the adapter; None for all.
        user: The function that was called, for messages.

    Raises:
        ConfigError: There is no such adapter, or it is no product that can be masked.
    """
    found: list[tuple[Any, str]] = []
    names = set()
    for path, layer in adapter_layers(bare_model(model)).items():
        here = [*getattr(layer, "lora_A", ()), *getattr(layer, "lora_embedding_A", ())]
        for name in here if adapter is None else {adapter} & {*here}:
            if reason := why_not_maskable(layer, name):
                raise ConfigError(f"{user}: {path}: {reason}, which masks cannot follow.")
            found.append((layer, name))
        names.update(here)
    if not found:
        there = f"; it has {', '.join(sorted(names))}" if names else ""
        asked = "" if adapter is None else f" {adapter!r}"
        raise ConfigError(f"{user}: the model has no LoRA adapter{asked}{there}.")
    return found


def why_not_maskable(layer: Any, adapter: str) -> str | None:  # noqa: ANN401
    """Return why an adapter cannot be masked, or None."""
    if reason := why_not_low_rank(layer, adapter):
        return reason
    if adapter in layer.merged_adapters:
        return f"peft has merged its adapter {adapter!r} (call unmerge_adapter first)"
    if layer.lora_bias.get(adapter):
        return f"its adapter {adapter!r} has a bias"
    base = base_layer(layer)
    known = isinstance(base, ADAPTED)
    return None if known else f"its adapter {adapter!r} is of a {type(base).__name__}"


def kept_weights(layer: nn.Module) -> Bool[Tensor, "O I"]:
    """Return where the weight of a linear is not zero."""
    base = base_layer(layer)
    weight = base.dense() if isinstance(base, SparseLinear) else weight_matrix(base)
    return weight.detach() != 0


class MaskedProduct:
    """A way to apply an adapter, of which peft asks ``layer.lora_variant``.

    It has no state, so copies of a model have masks of their own.
    """

    masks_product = True

    def forward(
        self,
        layer: Any,  # noqa: ANN401  a class of peft
        *,
        active_adapter: str,
        x: Tensor,
        result: Tensor,
        **_: object,
    ) -> Tensor:
        """Return the output of a layer with its adapter.

        Args:
            layer: The adapter layer.
            active_adapter: Name of the adapter.
            x: Input; token ids of embeddings.
            result: Output without this adapter.
        """
        scale = layer.scaling[active_adapter]
        if active_adapter in layer.lora_embedding_A:
            return result + scale * _embedded(layer, active_adapter, x)
        dropped = layer.lora_dropout[active_adapter](x)
        down, up = layer.lora_A[active_adapter].weight, layer.lora_B[active_adapter].weight
        # Computed again in the backward, so that no matrix of the size of the weight waits for it.
        added = checkpoint(
            _masked, dropped, down, up, layer, use_reentrant=False, preserve_rng_state=False
        )
        return result + scale * added

    def merge_safe(self, layer: Any, adapter: str, weight: Tensor) -> Tensor:  # noqa: ANN401
        """Return a new weight, as stored, with the adapter merged."""
        return weight + _stored(layer, adapter).to(weight.dtype)

    def merge_unsafe(self, layer: Any, adapter: str, weight: Tensor) -> None:  # noqa: ANN401
        """Merge an adapter into a weight, as stored, in place."""
        weight.data.add_(_stored(layer, adapter).to(weight.dtype))

    def unmerge(self, layer: Any, adapter: str, weight: Tensor) -> Tensor:  # noqa: ANN401
        """Return a stored weight without an adapter merged into it."""
        return weight.data - _stored(layer, adapter).to(weight.dtype)

    def supports_lora_conversion(self) -> bool:
        """Return False: under a mask the product has a higher rank."""
        return False


def _masked(
    x: Float[Tensor, "T I"], down: Float[Tensor, "R I"], up: Float[Tensor, "O R"], layer: nn.Module
) -> Float[Tensor, "T O"]:
    return linear(x, (up @ down) * kept_weights(layer))


def _embedded(layer: Any, adapter: str, ids: Tensor) -> Tensor:  # noqa: ANN401
    """Return the output of an adapter on embeddings, without its scale."""
    base = base_layer(layer)
    down, up = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    added = embedding(ids, down.T) @ up.T
    added = added * (embedding(ids, base.weight.detach()) != 0)  # pyright: ignore
    return added * getattr(base, "embed_scale", 1.0)  # by which some families scale theirs


def _stored(layer: Any, adapter: str) -> Tensor:  # noqa: ANN401
    """Return the masked product of an adapter, as stored."""
    return layer.get_delta_weight(adapter) * outputs_first(layer, kept_weights(layer))
