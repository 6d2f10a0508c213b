"""Gate gradient: prune units whose gates change the loss least first."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import ClassVar

from typing_extensions import override

from prunekit.models.units.kinds import KINDS, Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker


class Gradient(Ranker):
    """``E |∂L/∂ξ|``: mean absolute gradient by the unit's gate ξ.

    The absolute value is taken per sample, since gradients of samples may have opposite signs. L is
    the mean over the predictions of a sample. Source: Michel et al. 2019, arXiv:1905.10650, eq. 2.
    """

    name: ClassVar[str] = "gradient"
    kinds: ClassVar[frozenset[Kind]] = frozenset(KINDS)
    needs_loss: ClassVar[bool] = True

    normalised: bool = False
    """Divide the scores of a layer by their Euclidean norm, as the paper does."""

    @override
    def score(self, gated: GatedModel) -> Scores:
        return self.combine([self.measure(gated)])

    @override
    def measure(self, gated: GatedModel) -> Scores:
        import torch

        sums = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in gated.groups}
        samples = 0
        for batch in gated.batches:
            size = len(batch["input_ids"])
            with ExitStack() as stack:
                # One gate per sample, so that one backward pass yields the gradient of each.
                values = [
                    stack.enter_context(
                        gate.holding(gate.value.detach().repeat(size, 1, 1).requires_grad_())
                    )
                    for gate in (gated.gates[group.name] for group in gated.groups)
                ]
                gradients, predictions = gated.forward.gradients(batch, lambda: values)  # noqa: B023
            weights = 1 / predictions.double().clamp_min(1)
            for name, gradient in zip(sums, gradients, strict=True):
                sums[name] += (gradient[:, 0].abs().double() * weights[:, None]).sum(0).cpu()
            samples += size
        gated.all_reduce_sums(sums.values())
        samples = sum(gated.ranks.all_gather_object(samples))
        return {name: total / samples for name, total in sums.items()}

    @override
    def combine(self, measured: Sequence[Scores]) -> Scores:
        (scores,) = measured
        if not self.normalised:
            return scores
        return {name: score / score.norm().clamp_min(1e-300) for name, score in scores.items()}
