"""Gradient of the gates: units that move the loss of a sample least go first."""

from __future__ import annotations

from contextlib import ExitStack
from typing import ClassVar

from typing_extensions import override

from prunekit.models.units.kinds import KINDS, Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker


class Gradient(Ranker):
    """``E |∂L/∂ξ|``: mean over samples of the gradient by the unit's gate ξ (Michel et al., 2019).

    The absolute value is taken of each sample, whose gradients may have opposite signs. L is the
    mean over the predictions of a sample. Source: arXiv:1905.10650, eq. 2.
    """

    name: ClassVar[str] = "gradient"
    kinds: ClassVar[frozenset[Kind]] = frozenset(KINDS)
    needs_loss: ClassVar[bool] = True

    normalised: bool = False
    """Scores of a layer are divided by their Euclidean norm, as the paper does."""

    @override
    def score(self, subject: GatedModel) -> Scores:
        import torch

        from prunekit.structured.batches import losses

        sums = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in subject.sites}
        samples = 0
        for batch in subject.batches:
            size = len(batch["input_ids"])
            with ExitStack() as held, torch.enable_grad():
                # A gate a sample, so that one backward gives the gradient of each.
                values = [
                    held.enter_context(
                        gate.holding(gate.value.detach().repeat(size, 1, 1).requires_grad_())
                    )
                    for gate in (subject.gates[site.name] for site in subject.sites)
                ]
                loss, predictions = losses(subject.model, batch)
                each = loss / predictions.clamp_min(1)
                gradients = torch.autograd.grad(each.sum(), values)
            for name, gradient in zip(sums, gradients, strict=True):
                sums[name] += gradient.abs().double().sum((0, 1)).cpu()
            samples += size
        subject.add(sums.values())
        samples = sum(subject.ranks.all_gather_object(samples))
        scores = {name: total / samples for name, total in sums.items()}
        if not self.normalised:
            return scores
        return {name: score / score.norm().clamp_min(1e-300) for name, score in scores.items()}
