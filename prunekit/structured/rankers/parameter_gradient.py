"""Parameter gradient: units whose weights the loss hardly minds go first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from torch import Tensor


class ParameterGradient(Ranker):
    """``Σ ‖∂L/∂W‖₂`` over the matrices of a unit, L the mean loss of all predictions."""

    name: ClassVar[str] = "parameter-gradient"
    needs_loss: ClassVar[bool] = True

    @override
    def score(self, subject: GatedModel) -> Scores:
        return by_matrix(subject, lambda _, gradient: gradient.square(), root=True)


def by_matrix(
    subject: GatedModel, value: Callable[[Tensor, Tensor], Tensor], *, root: bool
) -> Scores:
    """Return, for each unit, the sum over its matrices of the summed values of its weights.

    ``value`` makes them of weights and their gradients; ``root``: of each sum the root is added.
    """
    import torch

    from prunekit.models.units.heads_neurons import matrix, oriented
    from prunekit.structured.probes.weight_gradients import weight_gradients

    parts = {
        site.name: [(site.reader, True), *((writer, False) for writer in site.writers)]
        for site in subject.sites
    }
    linears = list(dict.fromkeys(part.linear for each in parts.values() for part, _ in each))
    gradients = weight_gradients(subject.model, linears, subject.batches, subject.ranks)
    scores = {}
    for site in subject.sites:
        totals = []
        for part, reads in parts[site.name]:
            weight, gradient = matrix(part.linear).detach(), gradients[part.linear]
            found = value(weight.double(), oriented(part.linear, gradient).double())
            sums = found.sum(0 if reads else 1).cpu()[part.index].flatten(1).sum(1)
            totals.append(sums.sqrt() if root else sums)
        scores[site.name] = torch.stack(totals).sum(0)
    return scores
