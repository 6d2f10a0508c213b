"""Magnitude: units with small weights go first."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from prunekit.models.units.kinds import KINDS, Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.models.units.base import UnitGroup
    from prunekit.models.units.heads_neurons import Site


class UnitMagnitude(Ranker):
    """``‖Q‖ + ‖K‖ + ‖V‖ + ‖O‖`` of a head, ``‖gate‖ + ‖up‖ + ‖down‖`` of a neuron (Frobenius).

    Of heads that share a key head, the norms of each one's queries and outputs are added; of a
    block, those of all its matrices.
    """

    name: ClassVar[str] = "magnitude"
    kinds: ClassVar[frozenset[Kind]] = frozenset(KINDS)
    needs_data: ClassVar[bool] = False

    @override
    def score(self, subject: GatedModel) -> Scores:
        from prunekit.models.units.heads_neurons import Site

        return {
            place.name: _of_slices(place) if isinstance(place, Site) else _of_shares(place)
            for place in subject.sites
        }


def _of_slices(site: Site) -> Tensor:
    """Return the norms of what the linears of heads or neurons hold of each."""
    from prunekit.models.units.heads_neurons import matrix

    read = matrix(site.reader.linear).detach().T
    parts = [(read, site.reader.index)]
    parts += [(matrix(part.linear).detach(), part.index) for part in site.writers]
    # The norm of some rows is that of the norms of each.
    norms = [rows.double().norm(dim=1).cpu()[index].norm(dim=2).sum(1) for rows, index in parts]
    return sum(norms[1:], norms[0])


def _of_shares(place: UnitGroup) -> Tensor:
    """Return the norms of what matrices hold of each unit."""
    import torch

    total = torch.zeros(place.units, dtype=torch.float64)
    for parameter, axis, owner in place.shares:
        if parameter.ndim > 1:
            others = [other for other in range(parameter.ndim) if other != axis]
            rows = torch.linalg.vector_norm(parameter.detach(), dim=others, dtype=total.dtype)
            squares = rows.cpu().square()
            total += torch.zeros_like(total).index_add_(0, owner, squares).sqrt()
    return total
