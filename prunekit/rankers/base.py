"""A ranker says how much each unit matters.

Shapes: U units of a site, B samples, T tokens, I inputs of the linear that reads the units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from pydantic import BaseModel, ConfigDict

from prunekit.kinds import Compensation, Kind
from prunekit.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel

    from prunekit.probes.batches import Batch
    from prunekit.probes.gates import Gate
    from prunekit.sites import Site

Scores: TypeAlias = "dict[str, Float[Tensor, ' U']]"
"""A score of each unit, by the name of its place; float64 on the CPU, higher stays."""


@dataclass(frozen=True)
class Subject:
    """The model that is looked at, as it is gated now.

    Attributes:
        model: In eval mode.
        sites: Where its units are, all of one kind; of blocks, which no linear reads, such as have
            what every :class:`prunekit.sites.Place` has.
        gates: The gate of each site, by its name.
        batches: What it is run on; none for a ranker that reads weights alone.
        ranks: The processes that run it on other samples, and end with the same scores.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    gates: Mapping[str, Gate]
    batches: Sequence[Batch]
    ranks: Ranks = ALONE

    def add(self, sums: Iterable[Tensor]) -> None:
        """Make sums over the batches those of all ranks, in place."""
        for each in sums:
            self.ranks.add(each, "scores")

    def total(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Return the sum over all ranks of numbers, by their names."""
        every = self.ranks.exchange(dict(counts))
        return {name: sum(each[name] for each in every) for name in counts}


class Ranker(BaseModel, ABC):
    """Weights, and what a model does with samples, → a score of each unit.

    Fields are settings, each documented by the string under it. ``kinds`` are the units it can
    rank; ``needs_data`` says whether it runs the model, ``needs_loss`` whether it also asks how
    well the model predicts; ``compensate`` is what suits what it leaves.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: ClassVar[str]
    kinds: ClassVar[frozenset[Kind]] = frozenset({"heads", "neurons"})
    needs_data: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = False
    compensate: ClassVar[Compensation] = "none"

    @property
    def parts(self) -> list[Ranker]:
        """The rankers that it asks: itself, or those that it puts together."""
        return [self]

    @abstractmethod
    def score(self, subject: Subject) -> Scores:
        """Return the scores; higher stays."""
