"""REAP: prune experts that change their tokens little first."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from prunekit.models.units.kinds import Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker


class Reap(Ranker):
    """``E gⱼ(x) · ‖fⱼ(x)‖₂``: mean over the tokens of each expert.

    The expert fⱼ counts with the share gⱼ for a token that is routed to it. An expert without
    tokens has the score 0. Source: Lasby et al. 2025, arXiv:2510.13999.
    """

    name: ClassVar[str] = "reap"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"experts"})

    @override
    def score(self, gated: GatedModel) -> Scores:
        from prunekit.structured.probes.expert_outputs import expert_sums

        found = expert_sums(gated, outputs=True)
        return {name: sums.outputs / sums.routed.clamp_min(1) for name, sums in found.items()}
