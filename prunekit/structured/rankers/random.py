"""Random scores: the baseline for every ranker."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from prunekit.models.units.kinds import KINDS, Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker


class RandomUnits(Ranker):
    """Uniform scores, without replacement; the seed determines them."""

    name: ClassVar[str] = "random"
    kinds: ClassVar[frozenset[Kind]] = frozenset(KINDS)
    needs_weights: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    seed: int = 0
    """Seed of the scores; report the mean and deviation over several seeds."""

    @override
    def score(self, gated: GatedModel) -> Scores:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        return {
            group.name: torch.rand(group.units, generator=generator, dtype=torch.float64)
            for group in gated.groups
        }
