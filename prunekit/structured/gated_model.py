"""A model with gates on its units, as rankers see it.

Shapes: U units of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from prunekit.distributed.ranks import SINGLE, Ranks

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel

    from prunekit.models.units.heads_neurons import Site
    from prunekit.structured.batches import Batch
    from prunekit.structured.gate import Gate

Scores: TypeAlias = "dict[str, Float[Tensor, ' U']]"
"""A score of each unit, by the name of its place; float64 on the CPU, higher stays."""


@dataclass(frozen=True)
class GatedModel:
    """The model that is looked at, as it is gated now.

    Attributes:
        model: In eval mode.
        sites: Where its units are, all of one kind; of blocks, which no linear reads, such as have
            what every :class:`prunekit.models.units.base.Place` has.
        gates: The gate of each site, by its name.
        batches: What it is run on; none for a ranker that reads weights alone.
        ranks: The processes that run it on other samples, and end with the same scores.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    gates: Mapping[str, Gate]
    batches: Sequence[Batch]
    ranks: Ranks = SINGLE

    def add(self, sums: Iterable[Tensor]) -> None:
        """Make sums over the batches those of all ranks, in place."""
        for each in sums:
            self.ranks.all_reduce_sum(each, "scores")

    def total(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Return the sum over all ranks of numbers, by their names."""
        every = self.ranks.all_gather_object(dict(counts))
        return {name: sum(each[name] for each in every) for name in counts}
