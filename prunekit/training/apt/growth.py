"""Growth of adapters to larger ranks, without a change of the output.

New rows of A are Gaussian, new columns of B zero, so the product B A stays the same. The factor of
the product does not depend on the rank.

Shapes: I input features, O output features, R rank, N new ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.architectures.adapters import adapter_layers
from prunekit.models.orientation import update_features

ADAPTER = "default"
"""Name of the adapter that peft adds."""


class Widening(NamedTuple):
    """A parameter that was replaced by a larger one.

    Attributes:
        before: The smaller parameter, which did not change.
        after: The new one.
        axis: Axis along which it grew, at the end.
    """

    before: nn.Parameter
    after: nn.Parameter
    axis: int

    def of(self, part: Tensor) -> Tensor:
        """Return a tensor shaped like the smaller parameter, padded with zeros."""
        return _padded(part, self.axis, self.after.shape[self.axis])


def initialize(model: nn.Module, seed: int) -> None:
    """Set every A to Gaussian numbers and every B to zero.

    Args:
        model: The model with the adapters.
        seed: Seed of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in low_rank_layers(model).values():
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        down.data.copy_(gaussian_rows(down, len(down), generator))
        up.data.zero_()


def set_scale(model: nn.Module, scale: float) -> None:
    """Set the factor of all products."""
    for layer in low_rank_layers(model).values():
        layer.scaling[ADAPTER] = scale


def low_rank_layers(model: nn.Module) -> dict[str, Any]:
    """Return the linears with an adapter, by their path."""
    layers = adapter_layers(model)
    return {name: each for name, each in layers.items() if ADAPTER in getattr(each, "lora_A", ())}


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Return the rank of each adapter, by the path of its linear."""
    return {name: len(each.lora_A[ADAPTER].weight) for name, each in low_rank_layers(model).items()}


def adapter_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return A and B of each adapter, by its linear."""
    return {
        name: (each.lora_A[ADAPTER].weight, each.lora_B[ADAPTER].weight)
        for name, each in low_rank_layers(model).items()
    }


def grown_ranks(
    ranks: Mapping[str, int],
    importance: Mapping[str, float],
    factor: float,
    most: int,
) -> dict[str, int]:
    """Return the new rank of each adapter that grows.

    The more important half grows to ``⌊r · factor⌋``, at most to ``most``.

    Args:
        ranks: The rank of each adapter.
        importance: The importance of each.
        factor: Δ′/Δ: parameters that adapters may have, over those that they have.
        most: Largest rank.
    """
    names = sorted(ranks, key=lambda name: (-importance[name], name))
    grown = {name: min(most, int(ranks[name] * factor)) for name in names[: -(-len(names) // 2)]}
    return {name: rank for name, rank in grown.items() if rank > ranks[name]}


@torch.no_grad()
def grow(model: nn.Module, ranks: Mapping[str, int], generator: torch.Generator) -> list[Widening]:
    """Grow adapters in place; the model's output does not change.

    Args:
        model: The model with the adapters.
        ranks: New rank of each adapter that grows.
        generator: Of the new rows.

    Returns:
        The replaced parameters; an optimizer has to follow.
    """
    layers, changes = low_rank_layers(model), []
    for name, rank in ranks.items():
        layer = layers[name]
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        rows = gaussian_rows(down.weight, rank - len(down.weight), generator)
        changes += [
            _replaced(down, torch.cat([down.weight, rows]), 0),
            _replaced(up, _padded(up.weight, 1, rank), 1),
        ]
        update_features(down)
        update_features(up)
        layer.r[ADAPTER] = rank
    return changes


def gaussian_rows(
    like: Float[Tensor, "R I"], count: int, generator: torch.Generator
) -> Float[Tensor, "N I"]:
    """Return rows of Gaussian numbers with variance 1 / I.

    Args:
        like: A matrix with rows of the size, type and device.
        count: Number of rows.
        generator: Of the numbers, on the CPU.
    """
    size = like.shape[1]
    return (torch.randn(count, size, generator=generator) / size**0.5).to(like)


def _replaced(linear: nn.Linear, weight: Tensor, axis: int) -> Widening:
    before = cast("nn.Parameter", linear.weight)
    after = linear.weight = nn.Parameter(weight, requires_grad=before.requires_grad)
    return Widening(before, after, axis)


def _padded(part: Tensor, axis: int, size: int) -> Tensor:
    shape = [*part.shape]
    shape[axis] = size - shape[axis]
    return torch.cat([part, part.new_zeros(shape)], axis)
