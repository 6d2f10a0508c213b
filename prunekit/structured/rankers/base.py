"""Base class of rankers, which score the importance of units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from prunekit.models.units.kinds import Compensation, Kind
from prunekit.structured.gated_model import GatedModel, Scores

if TYPE_CHECKING:
    from prunekit.models.units.base import UnitGroup


class Cost(NamedTuple):
    """Work and memory of a ranker for a group, besides running blocks.

    Attributes:
        token_flops: Floating-point operations of each token.
        flops: Those that do not depend on the number of tokens.
        held: Bytes of statistics, which are held for all groups of a block.
        solving: Further bytes of main memory while the group is scored.
    """

    token_flops: int = 0
    flops: int = 0
    held: int = 0
    solving: int = 0


class Ranker(BaseModel, ABC):
    """Scores the units of a model; its fields are settings.

    Attributes:
        name: Name in configs and in ``Gates.score``.
        kinds: Kinds of units that it can rank.
        needs_weights: Its scores depend on the model.
        needs_data: It runs the model on samples.
        needs_loss: It also needs the loss on these samples.
        compares_losses: Its scores are losses of the model with other gates.
        by_weights: It differentiates the loss by the weights of units.
        compensate: The default compensation after pruning by it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    name: ClassVar[str]
    kinds: ClassVar[frozenset[Kind]] = frozenset({"heads", "neurons"})
    needs_weights: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = False
    compares_losses: ClassVar[bool] = False
    by_weights: ClassVar[bool] = False
    compensate: ClassVar[Compensation] = "none"

    @property
    def components(self) -> list[Ranker]:
        """The rankers whose scores it combines; itself if it combines none."""
        return [self]

    @property
    def forwards(self) -> int:
        """Forwards of each block over all samples, besides those that are differentiated."""
        return int(self.needs_data and not self.needs_loss)

    def cost(self, group: UnitGroup, length: int) -> Cost:  # noqa: ARG002  of some rankers
        """Return work and memory for a group, for the plan.

        Args:
            group: The group.
            length: Tokens of a sample.
        """
        return Cost()

    @abstractmethod
    def score(self, gated: GatedModel) -> Scores:
        """Return the score of each unit, by group name; higher is kept."""

    def measure(self, gated: GatedModel) -> Scores:
        """Return the values from which :meth:`combine` makes the scores.

        It may be called for one block at a time: a value depends on its unit alone. Values of a
        coordinate, which is a part of many blocks, are added.
        """
        return self.score(gated)

    def combine(self, measured: Sequence[Scores]) -> Scores:
        """Return the scores of all units, given each component's values."""
        (scores,) = measured
        return scores
