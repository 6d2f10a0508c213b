"""Block OBS: output error without a unit, after a refit.

With H = XᵀX of the input X of the reading linear, and P the inputs of a unit,

    loss = tr(W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ),  and the best weights of the kept K are  W H_:K (H_KK)⁻¹.

Source: Kurtic et al., ZipLM, eq. 3, arXiv:2302.04089; Hassibi & Stork, 1993, for one weight.
Shapes: U units, S inputs of each, O outputs and I inputs of the linear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from pydantic import Field
from typing_extensions import override

from prunekit.models.units.kinds import Compensation
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Cost, Ranker

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from prunekit.models.units.base import UnitGroup
    from prunekit.models.units.heads_neurons import LinearUnitGroup


class BlockObs(Ranker):
    """``tr(W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ)`` per token; if ``relative``, over the layer's whole output."""

    name: ClassVar[str] = "obs"
    compensate: ClassVar[Compensation] = "refit"

    damping: float = Field(default=0.01, gt=0, le=1)
    """Fraction of the mean diagonal of H that is added to its diagonal."""

    relative: bool = True
    """Divide by ``tr(W H Wᵀ)``, so that layers with large outputs do not outweigh others."""

    @override
    def score(self, gated: GatedModel) -> Scores:
        from prunekit.structured.refit import reader_grams

        grams = reader_grams(gated)
        return {group.name: self._score(group, grams[group.name]) for group in gated.groups}

    @override
    def cost(self, group: UnitGroup, length: int) -> Cost:
        from prunekit.models.orientation import features
        from prunekit.statistics import Gram
        from prunekit.structured.refit import removal_bytes, removal_flops

        linear = cast("LinearUnitGroup", group)
        outputs, inputs = features(linear.reader.linear)
        whole_output = 2 * outputs * inputs**2 * self.relative
        return Cost(
            Gram.flops(inputs),
            removal_flops(linear) + whole_output,
            Gram.nbytes(inputs),
            removal_bytes(linear),
        )

    def _score(self, group: LinearUnitGroup, total: Float[Tensor, "I I"]) -> Float[Tensor, " U"]:
        from prunekit.models.adapters import effective_weight
        from prunekit.structured.refit import removal_loss

        loss = removal_loss(group, total, self.damping)
        if not self.relative:
            return loss
        weight = effective_weight(group.reader.linear).double().cpu()
        return loss / ((weight @ total.double().cpu()) * weight).sum().clamp_min(1e-300)
