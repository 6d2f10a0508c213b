"""RIA: relative importance times input norm."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from typing_extensions import override

from prunekit.methods.base import ScaledMagnitude, ScoreFactors
from prunekit.methods.layer import Layer
from prunekit.statistics import ColumnEnergy, Statistic


class Ria(ScaledMagnitude):
    """``(|Wᵢⱼ| / Σ_row |W| + |Wᵢⱼ| / Σ_column |W|) · ‖Xⱼ‖₂^a`` (Zhang et al., ICLR 2024, eq. 4)."""

    name: ClassVar[str] = "ria"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({ColumnEnergy})

    activation_power: float = Field(default=0.5, ge=0)
    """Exponent a of the input norm; 0.5 as published."""

    @override
    def factors(self, layer: Layer) -> ScoreFactors:
        import torch

        magnitude = layer.weight.abs()
        # In float64, then rounded, so that the number of ranks that share the rows changes no bit.
        total = magnitude.sum(0, dtype=torch.float64)
        layer.all_reduce_sum(total)
        # An all-zero row or column has score 0, not 0 / 0.
        row, column = (1 / part.float().clamp_min(1e-38) for part in (magnitude.sum(1), total))
        energy = layer.stats[ColumnEnergy]
        norm = (energy.total / max(energy.tokens, 1)).sqrt()
        return ScoreFactors(norm**self.activation_power, (row, column))
