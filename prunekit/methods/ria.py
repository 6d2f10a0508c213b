"""RIA: relative importance and activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from pydantic import Field
from typing_extensions import override

from prunekit.layer import Layer
from prunekit.methods.base import Scored
from prunekit.statistics import ColumnEnergy, Statistic

if TYPE_CHECKING:
    from torch import Tensor


class Ria(Scored):
    """``(|Wᵢⱼ| / Σ_row |W| + |Wᵢⱼ| / Σ_column |W|) · ‖Xⱼ‖₂^a`` (Zhang et al., ICLR 2024, eq. 4)."""

    name: ClassVar[str] = "ria"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({ColumnEnergy})

    activation_power: float = Field(default=0.5, ge=0)
    """Exponent a of the input norm; 0.5 as published."""

    @override
    def score(self, layer: Layer) -> Float[Tensor, "O I"]:
        magnitude = layer.weight.abs()
        # An all-zero row or column has score 0, not 0 / 0.
        row = magnitude.sum(1, keepdim=True).clamp_min(1e-38)
        column = magnitude.sum(0, keepdim=True).clamp_min(1e-38)
        energy = layer.stats[ColumnEnergy]
        norm = (energy.total / max(energy.tokens, 1)).sqrt()
        return (magnitude / row + magnitude / column) * norm**self.activation_power
