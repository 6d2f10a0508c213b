"""Parameter budgets of windows, and the units that fit them.

Shapes: U units of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunekit.models.units.kinds import WHOLE
from prunekit.models.units.stock_config import expressible_in_config
from prunekit.structured.parameter_budget import (
    BudgetConstraints,
    Keep,
    ParameterCounter,
    counted_parameters,
    select_within_budget,
)
from prunekit.structured.shared_scores import share_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.config.apt_table import Apt
    from prunekit.models.units.base import UnitGroup


class WindowBudget:
    """Counts the parameters of a model, and chooses units within the budget.

    Attributes:
        first: Parameters that are counted, of the dense model.
    """

    def __init__(self, model: PreTrainedModel, settings: Apt) -> None:
        self._model, self._settings = model, settings
        self.recount()
        self.first = self._whole

    def recount(self) -> None:
        """Count the parameters anew, as units were removed."""
        counted = counted_parameters(self._model, self._settings.parameters_of)
        self._whole = sum(each.numel() for each in counted)

    def remaining(self, groups: Sequence[UnitGroup], keep: Keep) -> int:
        """Return the parameters of the model with only the kept units.

        Args:
            groups: The groups of all kinds.
            keep: The kept units of each group.
        """
        counted = counted_parameters(self._model, self._settings.parameters_of)
        return ParameterCounter(groups, self._whole, counted).remaining(keep)

    def check(self, groups: Sequence[UnitGroup], keep: Keep) -> None:
        """Refuse a budget that cannot be met.

        Args:
            groups: The groups of all kinds.
            keep: The kept units of each group.

        Raises:
            ConfigError: It cannot.
        """
        equal = {group.name: torch.ones(group.units) for group in groups}
        self.select(groups, equal, keep, self._settings.windows)

    def select(
        self, groups: Sequence[UnitGroup], scores: Mapping[str, Tensor], keep: Keep, window: int
    ) -> dict[str, Tensor]:
        """Return the units to keep at the end of a window.

        Args:
            groups: The groups of all kinds.
            scores: Score of each unit [U], by group.
            keep: The units that are left, by group.
            window: Number of the window, counted from 1.

        Raises:
            ConfigError: The budget cannot be met.
        """
        settings = self._settings
        described = [group for group in groups if settings.uniform or group.kind in WHOLE]
        if settings.uniform:
            scores = share_scores(groups, dict(scores))
        constraints = BudgetConstraints(
            parameters=int(settings.budget(window) * self.first),
            scope="layer" if settings.uniform else "global",
            least=settings.least,
            multiples={group.name: group.unit_multiple(settings.round_to) for group in groups},
            allowed=expressible_in_config(self._model, described),
            counted=counted_parameters(self._model, settings.parameters_of),
        )
        return select_within_budget(groups, scores, keep, self._whole, constraints)
