"""LLM Surgeon: loss increase without a unit, after a refit.

With H = XᵀX of the input X of the reading linear, G = gᵀg of the gradients g of the loss by its
output, and P the inputs of a unit, the loss rises, in Kronecker-factored second order, by

    ½ tr(G W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ),

and the weights that attain it are those of a refit, independent of G.

Source: van der Ouderaa et al. 2024, The LLM Surgeon, §3.1 and 3.3, arXiv:2312.17244.
Shapes: U units, I inputs and O outputs of the linear.
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


class Surgeon(Ranker):
    """``½ tr(G W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ)``: obs with output errors weighted by the loss gradients."""

    name: ClassVar[str] = "surgeon"
    needs_loss: ClassVar[bool] = True
    compensate: ClassVar[Compensation] = "refit"

    damping: float = Field(default=0.01, gt=0, le=1)
    """Fraction of the mean diagonal of H that is added to its diagonal."""

    full: bool = False
    """Use all of G, as the paper does. Otherwise the mean of its diagonal weights all outputs of a
    layer alike: it is estimated far better from few tokens, and measured better."""

    @override
    def score(self, gated: GatedModel) -> Scores:
        from prunekit.structured.refit import reader_grams, removal_loss

        curvatures = self._output_curvatures(gated)
        grams = reader_grams(gated)
        scores = {}
        for group in gated.groups:
            curvature = curvatures[group.name]
            loss = removal_loss(
                group, grams[group.name], self.damping, curvature if self.full else None
            )
            scores[group.name] = loss / 2 if self.full else loss * curvature / 2
        return scores

    @property
    @override
    def forwards(self) -> int:
        return 1  # for H

    @override
    def cost(self, group: UnitGroup, length: int) -> Cost:
        from prunekit.models.orientation import features
        from prunekit.statistics import Gram
        from prunekit.structured.refit import removal_bytes, removal_flops

        linear = cast("LinearUnitGroup", group)
        outputs, inputs = features(linear.reader.linear)
        weighted = self.full * 2 * outputs**2
        return Cost(
            Gram.flops(inputs) + weighted,
            removal_flops(linear) + weighted * inputs,
            Gram.nbytes(inputs),
            removal_bytes(linear),
        )

    def _output_curvatures(self, gated: GatedModel) -> dict[str, Float[Tensor, ...]]:
        """Return G of each group, or its mean diagonal, per prediction.

        The values are float64 on the CPU.
        """
        from prunekit.structured.probes.reader_inputs import activations_and_gradients

        linears = [group.reader.linear for group in gated.groups]
        sums: dict[str, Tensor] = {}
        predictions = 0.0
        for batch in gated.batches:
            _, gradients, count = activations_and_gradients(gated, batch, linears, outputs=True)
            predictions += float(count.sum())
            for group, gradient in zip(gated.groups, gradients, strict=True):
                rows = gradient.flatten(0, -2).double()
                part = rows.T @ rows if self.full else rows.square().sum() / rows.shape[1]
                sums[group.name] = sums.get(group.name, 0) + part.cpu()
        gated.all_reduce_sums(sums.values())
        predictions = sum(gated.ranks.all_gather_object(predictions))
        return {name: total / max(predictions, 1.0) for name, total in sums.items()}
