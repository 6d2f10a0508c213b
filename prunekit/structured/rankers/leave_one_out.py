"""Leave one out: loss increase without each unit.

It is the reference that other rankers are compared with.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

from typing_extensions import override

from prunekit.models.units.kinds import KINDS, Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker


class LeaveOneOut(Ranker):
    """``L(without the unit) − L``, one run of all batches per unit.

    Units that are pruned already score 0. Scoring again after each removal is the greedy search,
    which accounts for interactions of units.
    """

    name: ClassVar[str] = "leave-one-out"
    kinds: ClassVar[frozenset[Kind]] = frozenset(KINDS)
    needs_loss: ClassVar[bool] = True
    compares_losses: ClassVar[bool] = True

    @override
    def score(self, gated: GatedModel) -> Scores:
        import torch

        (before,) = gated.forward.mean_losses([nullcontext()])
        scores = {}
        for group in gated.groups:
            gate, units = gated.gates[group.name], [*gated.forward.units(group)]
            closed = gate.value.repeat(len(units), 1)
            closed[range(len(units)), units] = 0
            losses = gated.forward.mean_losses([gate.holding(each) for each in closed])
            scores[group.name] = torch.zeros(group.units, dtype=torch.float64)
            scores[group.name][units] = torch.tensor(losses, dtype=torch.float64) - before
        return scores
