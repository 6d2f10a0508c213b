"""LLM Surgeon: what the loss rises by when a unit goes and the others of its layer make up for it.

With H = XᵀX of what the reading linear reads, G = gᵀg of the gradients of the loss by what it
gives, and P the inputs of a unit, the loss rises, in Kronecker-factored second order, by

    ½ tr(G W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ),

and the weights for that are those of a refit, whatever G is.

Source: van der Ouderaa et al. 2024, The LLM Surgeon, §3.1 and 3.3, arXiv:2312.17244.
Shapes: U units, I inputs and O outputs of the linear.
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


class Surgeon(Ranker):
    """``½ tr(G W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ)``: obs, but an error weighs as much as the loss minds it."""

    name: ClassVar[str] = "surgeon"
    needs_loss: ClassVar[bool] = True
    compensate: ClassVar[Compensation] = "refit"

    damping: float = Field(default=0.01, gt=0)
    """What is added to the diagonal of H, as a part of its mean."""

    full: bool = False
    """G as the paper has it; otherwise the mean of its diagonal stands for it, so that outputs of a
    layer weigh alike: of few tokens that is known far better, and measured better."""

    @override
    def score(self, subject: GatedModel) -> Scores:
        from prunekit.structured.refit import gather, removal_loss

        minded = self._minded(subject)
        grams = gather(subject)
        found = {}
        for site in subject.sites:
            weight = minded[site.name]
            off = removal_loss(site, grams[site.name], self.damping, weight if self.full else None)
            found[site.name] = off / 2 if self.full else off * weight / 2
        return found

    def _minded(self, subject: GatedModel) -> dict[str, Float[Tensor, ...]]:
        """Return G of each site, or its diagonal's mean; a prediction, float64 on the CPU."""
        from prunekit.structured.probes.reader_inputs import inputs_and_gradients

        found: dict[str, Tensor] = {}
        predictions = 0.0
        for batch in subject.batches:
            _, gradients, count = inputs_and_gradients(subject, batch, outputs=True)
            predictions += count
            for site, gradient in zip(subject.sites, gradients, strict=True):
                rows = gradient.flatten(0, -2).double()
                part = rows.T @ rows if self.full else rows.square().sum() / rows.shape[1]
                found[site.name] = found.get(site.name, 0) + part.cpu()
        subject.add(found.values())
        predictions = sum(subject.ranks.all_gather_object(predictions))
        return {name: total / max(predictions, 1.0) for name, total in found.items()}
