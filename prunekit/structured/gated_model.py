"""A model with gates on its units, as rankers see it.

Shapes: U units of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.structured.forward import Forward, WholeModel

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel

    from prunekit.models.units.heads_neurons import LinearUnitGroup
    from prunekit.structured.batches import Batch
    from prunekit.structured.gate import Gate

Scores: TypeAlias = "dict[str, Float[Tensor, ' U']]"
"""A score for each unit, by group name; float64 on the CPU, higher is kept."""


@dataclass(frozen=True)
class GatedModel:
    """The model to be ranked, with the current gates.

    Attributes:
        model: In eval mode.
        groups: Its groups, all of one kind. Groups of blocks and coordinates have only the members
            of :class:`prunekit.models.units.base.UnitGroup`; a ranker of these uses no others.
        gates: The gate of each group, by group name.
        batches: Calibration batches; none for a ranker of weights alone.
        ranks: Processes that run the other batches and end with the same scores.
        part: Runs the batches, if not the whole model does.
    """

    model: PreTrainedModel
    groups: Sequence[LinearUnitGroup]
    gates: Mapping[str, Gate]
    batches: Sequence[Batch]
    ranks: Ranks = SINGLE
    part: Forward | None = None

    @property
    def forward(self) -> Forward:
        """Runs the batches."""
        return self.part or WholeModel(self.model, self.batches, self.ranks)

    @property
    def device(self) -> torch.device:
        """Device of the gates, on which the batches run."""
        return self.gates[self.groups[0].name].value.device

    def all_reduce_sums(self, sums: Iterable[Tensor]) -> None:
        """Add sums over the batches of all ranks, in place."""
        for each in sums:
            self.ranks.all_reduce_sum(each, "scores")

    def all_reduce_counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Return the sum of each number over all ranks, by name."""
        every = self.ranks.all_gather_object(dict(counts))
        return {name: sum(each[name] for each in every) for name in counts}
