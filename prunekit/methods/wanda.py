"""Wanda: weight magnitude times input norm."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from prunekit.methods.base import ScaledMagnitude, ScoreFactors
from prunekit.methods.layer import Layer
from prunekit.statistics import ColumnEnergy, Statistic


class Wanda(ScaledMagnitude):
    """``|Wᵢⱼ| · ‖Xⱼ‖₂``, compared within each output row (Sun et al., arXiv:2306.11695, eq. 1)."""

    name: ClassVar[str] = "wanda"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({ColumnEnergy})

    @override
    def factors(self, layer: Layer) -> ScoreFactors:
        energy = layer.stats[ColumnEnergy]
        return ScoreFactors((energy.total / max(energy.tokens, 1)).sqrt())
