"""FLAP: prune units with nearly constant outputs first.

A constant output can be replaced by a bias.

Shapes: T tokens, I inputs of the linear that reads the units.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.models.units.heads_neurons import LinearUnitGroup

    # Number of tokens, means, and sums of squared deviations from the means.
    _State = tuple[int, Tensor, Tensor]


class Flap(Ranker):
    """``Var(xⱼ) · ‖W_:ⱼ‖²``, mean over the inputs j of a unit.

    Source: An et al. 2024 (WIFV), arXiv:2312.11983, eq. 4 and 6.
    """

    name: ClassVar[str] = "flap"

    standardised: bool = True
    """Subtract the mean of the layer and divide by its standard deviation, as the paper does to
    compare layers."""

    @override
    def score(self, gated: GatedModel) -> Scores:
        from prunekit.models.adapters import effective_weight
        from prunekit.structured.probes.reader_inputs import observe_inputs

        states: dict[str, _State] = {}

        def observe(group: LinearUnitGroup, x: Tensor) -> None:
            x = x.double()
            new = len(x), x.mean(0), (x - x.mean(0)).square().sum(0)
            states[group.name] = _merged(states[group.name], new) if group.name in states else new

        observe_inputs(gated, observe)
        own = {name: (n, mean.cpu(), off.cpu()) for name, (n, mean, off) in states.items()}
        every = gated.ranks.all_gather_object(own)
        states = {name: reduce(_merged, (each[name] for each in every)) for name in states}
        scores = {}
        for group in gated.groups:
            count, _, squares = states[group.name]
            norms = effective_weight(group.reader.linear).double().square().sum(0)
            score = (squares / max(count - 1, 1) * norms.cpu())[group.reader.index].mean((1, 2))
            if self.standardised and len(score) > 1:
                score = (score - score.mean()) / score.std().clamp_min(1e-300)
            scores[group.name] = score
        return scores


def _merged(old: _State, new: _State) -> _State:
    """Return the merged state of two token sets (Chan et al.)."""
    count, difference = old[0] + new[0], new[1] - old[1]
    return (
        count,
        old[1] + difference * (new[0] / count),
        old[2] + new[2] + difference.square() * (old[0] * new[0] / count),
    )
