"""Projection of ADMM onto the matrices that a pattern allows.

Shapes: O output features of all stacked layers, I input features, B bytes of a row's packed mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float, UInt8

from prunekit.methods.layer import Layer
from prunekit.patterns import Grouped

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Projection:
    """Projection of stacked layers onto their patterns; stores the masks.

    Attributes:
        layers: The layers, stacked one above the other.
        bits: Packed mask of each layer, from the last projection.
    """

    layers: Sequence[Layer]
    bits: Sequence[UInt8[Tensor, "O B"]] = ()

    def __call__(self, x: Float[Tensor, "O I"], dual: Float[Tensor, "O I"]) -> None:
        """Replace X by D = P(X + U), U by the difference.

        That is X + U − D.

        Args:
            x: X.
            dual: U.
        """
        counts = row_counts(self.layers)
        parts = zip(self.layers, x.split(counts), dual.split(counts), strict=True)
        self.bits = [_project(*part) for part in parts]

    @property
    def keep(self) -> Bool[Tensor, "O I"]:
        """The mask of the last projection."""
        import torch
        from prunekit_kernels import unpack

        inputs = self.layers[0].weight.shape[1]
        return torch.cat([unpack(bits, inputs) for bits in self.bits])


def row_counts(layers: Sequence[Layer]) -> list[int]:
    """Return the number of rows of each layer's weight."""
    return [len(layer.weight) for layer in layers]


def _project(
    layer: Layer, x: Float[Tensor, "O I"], dual: Float[Tensor, "O I"]
) -> UInt8[Tensor, "O B"]:
    from prunekit_kernels import pack, project

    pattern = layer.pattern
    if isinstance(pattern, Grouped) and not pattern.tiled:
        outputs, inputs = x.shape
        return project(x, dual, 1.0, pattern.groups(outputs, inputs, layer.sparsity), x)
    # The nearest tiles are those with the largest Σ T², whereas `project` compares Σ |T|. Single
    # weights are compared as `project` does, so that rows over several ranks give the same mask.
    x += dual
    keep = pattern.keep(x.square() if pattern.tiled else x.abs(), layer.sparsity)
    dual.copy_(x).masked_fill_(keep, 0)
    x -= dual
    return pack(keep)
