"""Leave one out: what the loss becomes without each unit; the truth that rankers are judged by."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from prunekit.models.units.kinds import KINDS, Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker


class LeaveOneOut(Ranker):
    """``L(without the unit) − L``, a run of all batches for each unit.

    Units that are pruned already score 0. Scoring again after each removal is the greedy search
    that takes into account what units do for each other.
    """

    name: ClassVar[str] = "leave-one-out"
    kinds: ClassVar[frozenset[Kind]] = frozenset(KINDS)
    needs_loss: ClassVar[bool] = True

    @override
    def score(self, subject: GatedModel) -> Scores:
        import torch

        from prunekit.structured.batches import mean_loss

        seen = subject.batches, subject.ranks
        before = mean_loss(subject.model, *seen)
        scores = {}
        for site in subject.sites:
            gate = subject.gates[site.name]
            changes = []
            for unit in range(site.units):
                closed = gate.value.clone()
                closed[unit] = 0
                with gate.holding(closed):
                    changes.append(mean_loss(subject.model, *seen) - before)
            scores[site.name] = torch.tensor(changes, dtype=torch.float64)
        return scores
