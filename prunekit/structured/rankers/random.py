"""Random: the baseline that every ranker has to beat."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from prunekit.models.units.kinds import KINDS, Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker


class RandomUnits(Ranker):
    """Uniform, without replacement, over all units; the same seed gives the same units."""

    name: ClassVar[str] = "random"
    kinds: ClassVar[frozenset[Kind]] = frozenset(KINDS)
    needs_data: ClassVar[bool] = False

    seed: int = 0
    """Report mean and deviation over several."""

    @override
    def score(self, subject: GatedModel) -> Scores:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        return {
            site.name: torch.rand(site.units, generator=generator, dtype=torch.float64)
            for site in subject.sites
        }
