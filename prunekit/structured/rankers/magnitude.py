"""Magnitude: prune units with small weights first."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from prunekit.models.units.kinds import KINDS, Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.models.units.base import UnitGroup
    from prunekit.models.units.heads_neurons import LinearUnitGroup


class UnitMagnitude(Ranker):
    """``‖Q‖ + ‖K‖ + ‖V‖ + ‖O‖`` of a head, ``‖gate‖ + ‖up‖ + ‖down‖`` of a neuron (Frobenius).

    For heads that share a key head, the norms of each head's queries and outputs are added; for a
    block or a coordinate, those of its slices of all matrices.
    """

    name: ClassVar[str] = "magnitude"
    kinds: ClassVar[frozenset[Kind]] = frozenset(KINDS)
    needs_data: ClassVar[bool] = False

    @override
    def score(self, gated: GatedModel) -> Scores:
        from prunekit.models.units.heads_neurons import LinearUnitGroup

        return {
            group.name: _linear_norms(group)
            if isinstance(group, LinearUnitGroup)
            else _slice_norms(group)
            for group in gated.groups
        }


def _linear_norms(group: LinearUnitGroup) -> Tensor:
    """Return the summed slice norms of each head or neuron."""
    from prunekit.models.adapters import effective_weight

    read = effective_weight(group.reader.linear).T
    parts = [(read, group.reader.index)]
    parts += [(effective_weight(part.linear), part.index) for part in group.writers]
    # The norm of several rows is the norm of their norms.
    norms = [rows.double().norm(dim=1).cpu()[index].norm(dim=2).sum(1) for rows, index in parts]
    return sum(norms[1:], norms[0])


def _slice_norms(group: UnitGroup) -> Tensor:
    """Return the summed norms of each unit's slices of the matrices."""
    import torch

    from prunekit.models.in_memory import whole_tensor

    total = torch.zeros(group.units, dtype=torch.float64)
    for parameter, axis, owner in group.parameter_axes:
        if parameter.ndim > 1 and not parameter.is_meta:  # of a block that is not loaded
            others = [other for other in range(parameter.ndim) if other != axis]
            rows = torch.linalg.vector_norm(
                whole_tensor(parameter.detach()), dim=others, dtype=total.dtype
            )
            squares = rows.cpu().square()
            total += torch.zeros_like(total).index_add_(0, owner, squares).sqrt()
    return total
