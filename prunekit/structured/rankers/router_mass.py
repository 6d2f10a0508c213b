"""Router mass: prune experts to which the router gives little weight first."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from prunekit.models.units.kinds import Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker


class RouterMass(Ranker):
    """``E gⱼ(x)``: mean share of an expert over all tokens.

    The share is 0 where the expert is not chosen.
    """

    name: ClassVar[str] = "router-mass"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"experts"})

    @override
    def score(self, gated: GatedModel) -> Scores:
        from prunekit.structured.probes.expert_outputs import expert_sums

        found = expert_sums(gated, outputs=False)
        return {name: sums.shares / max(sums.tokens, 1) for name, sums in found.items()}
