"""Wanda: weight magnitude times input norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from typing_extensions import override

from prunekit.layer import Layer
from prunekit.methods.base import Scored
from prunekit.statistics import ColumnEnergy, Statistic

if TYPE_CHECKING:
    from torch import Tensor


class Wanda(Scored):
    """``|Wᵢⱼ| · ‖Xⱼ‖₂``, compared within each output row (Sun et al., arXiv:2306.11695, eq. 1)."""

    name: ClassVar[str] = "wanda"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({ColumnEnergy})

    @override
    def score(self, layer: Layer) -> Float[Tensor, "O I"]:
        energy = layer.stats[ColumnEnergy]
        return layer.weight.abs() * (energy.total / max(energy.tokens, 1)).sqrt()
