"""A ranker says how much each unit matters.

Shapes: U units of a site, B samples, T tokens, I inputs of the linear that reads the units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from prunekit.models.units.kinds import Compensation, Kind
from prunekit.structured.gated_model import GatedModel, Scores


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
    def score(self, subject: GatedModel) -> Scores:
        """Return the scores; higher stays."""
