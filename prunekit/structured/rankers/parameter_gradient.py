"""Parameter gradient: prune units first whose weights affect the loss little."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from torch import Tensor


class ParameterGradient(Ranker):
    """``Σ ‖∂L/∂W‖₂`` over the matrices of a unit.

    L is the mean loss of all predictions.
    """

    name: ClassVar[str] = "parameter-gradient"
    needs_loss: ClassVar[bool] = True
    by_weights: ClassVar[bool] = True

    @override
    def score(self, gated: GatedModel) -> Scores:
        return by_matrix(gated, lambda _, gradient: gradient.square(), root=True)


def by_matrix(
    gated: GatedModel, value: Callable[[Tensor, Tensor], Tensor], *, root: bool
) -> Scores:
    """Return per-weight values summed over the matrices of each unit.

    Args:
        gated: The model, its groups and the batches.
        value: Maps weights and their gradients, [O, I] float64, to values of the same shape.
        root: Add the square root of each matrix's sum instead of the sum.
    """
    import torch

    from prunekit.models.adapters import effective_weight
    from prunekit.models.orientation import outputs_first
    from prunekit.structured.probes.weight_gradients import weight_gradients

    parts = {
        group.name: [(group.reader, True), *((writer, False) for writer in group.writers)]
        for group in gated.groups
    }
    linears = list(dict.fromkeys(part.linear for each in parts.values() for part, _ in each))
    gradients = weight_gradients(gated, linears)
    scores = {}
    for group in gated.groups:
        totals = []
        for part, reads in parts[group.name]:
            weight, gradient = effective_weight(part.linear), gradients[part.linear]
            values = value(weight.double(), outputs_first(part.linear, gradient).double())
            sums = values.sum(0 if reads else 1).cpu()[part.index].flatten(1).sum(1)
            totals.append(sums.sqrt() if root else sums)
        scores[group.name] = torch.stack(totals).sum(0)
    return scores
