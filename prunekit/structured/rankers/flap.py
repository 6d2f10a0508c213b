"""FLAP: units whose inputs hardly fluctuate go first, since a constant can stand for them.

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

    from prunekit.models.units.heads_neurons import Site

    # Tokens, means, and sums of squared deviations from these.
    _State = tuple[int, Tensor, Tensor]


class Flap(Ranker):
    """``Var(xⱼ) · ‖W_:ⱼ‖²``, mean over the inputs j of a unit (An et al. 2024, WIFV).

    Source: arXiv:2312.11983, eq. 4 and 6.
    """

    name: ClassVar[str] = "flap"

    standardised: bool = True
    """Deviations from the mean of the layer, in its standard deviations, as the paper compares
    layers."""

    @override
    def score(self, subject: GatedModel) -> Scores:

        from prunekit.models.units.heads_neurons import matrix
        from prunekit.structured.probes.reader_inputs import observe_inputs

        states: dict[str, _State] = {}

        def see(site: Site, x: Tensor) -> None:
            x = x.double()
            new = len(x), x.mean(0), (x - x.mean(0)).square().sum(0)
            states[site.name] = _merged(states[site.name], new) if site.name in states else new

        observe_inputs(subject, see)
        own = {name: (n, mean.cpu(), off.cpu()) for name, (n, mean, off) in states.items()}
        every = subject.ranks.all_gather_object(own)
        states = {name: reduce(_merged, (each[name] for each in every)) for name in states}
        scores = {}
        for site in subject.sites:
            count, _, squares = states[site.name]
            norms = matrix(site.reader.linear).detach().double().square().sum(0)
            score = (squares / max(count - 1, 1) * norms.cpu())[site.reader.index].mean((1, 2))
            if self.standardised and len(score) > 1:
                score = (score - score.mean()) / score.std().clamp_min(1e-300)
            scores[site.name] = score
        return scores


def _merged(old: _State, new: _State) -> _State:
    """Return the state of the tokens of both, as by Chan et al."""
    count, apart = old[0] + new[0], new[1] - old[1]
    return (
        count,
        old[1] + apart * (new[0] / count),
        old[2] + new[2] + apart.square() * (old[0] * new[0] / count),
    )
