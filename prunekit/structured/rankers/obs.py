"""Block OBS: what is lost of a layer's output when a unit goes and the others make up for it.

With H = XᵀX of what the reading linear reads, and P the inputs of a unit,

    loss = tr(W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ),  and the best weights of the kept K are  W H_:K (H_KK)⁻¹.

Source: Kurtic et al., ZipLM, eq. 3, arXiv:2302.04089; Hassibi & Stork, 1993, for one weight.
Shapes: U units, S inputs of each, O outputs and I inputs of the linear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from typing_extensions import override

from prunekit.models.units.kinds import Compensation
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from prunekit.models.units.heads_neurons import Site


class BlockObs(Ranker):
    """``tr(W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ)`` a token, by the layer's whole output if ``relative``."""

    name: ClassVar[str] = "obs"
    compensate: ClassVar[Compensation] = "refit"

    damping: float = Field(default=0.01, gt=0)
    """What is added to the diagonal of H, as a part of its mean."""

    relative: bool = True
    """Divided by ``tr(W H Wᵀ)``, so that layers whose outputs are large do not outweigh others."""

    @override
    def score(self, subject: GatedModel) -> Scores:
        from prunekit.structured.refit import gather

        grams = gather(subject)
        return {site.name: self._score(site, grams[site.name]) for site in subject.sites}

    def _score(self, site: Site, total: Float[Tensor, "I I"]) -> Float[Tensor, " U"]:
        from prunekit.models.units.heads_neurons import matrix
        from prunekit.structured.refit import removal_loss

        found = removal_loss(site, total, self.damping)
        if not self.relative:
            return found
        weight = matrix(site.reader.linear).detach().double().cpu()
        return found / ((weight @ total.double().cpu()) * weight).sum().clamp_min(1e-300)
