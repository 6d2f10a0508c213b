"""Groups of units: their parameters, gates and removal.

Shapes: U units of a group, R rows of a parameter along an axis, B samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, lcm
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from prunekit.models.units.kinds import Kind

Factor = Callable[[], Float[Tensor, "*B U"]]
"""Returns the factor of each unit: float32 [U], or [B, 1, U] for one factor per sample."""

Kept = Mapping[str, Sequence[int]]
"""The kept units of each group, by group name, in ascending order."""


class ParameterAxis(NamedTuple):
    """Owning unit of each row of a parameter along an axis."""

    parameter: nn.Parameter
    axis: int
    owner: Int[Tensor, " R"]


@dataclass(frozen=True)
class UnitGroup(ABC):
    """Units of one kind that are scored, gated and removed together.

    A group describes the model at the time it was found; find the groups again after a removal.

    Attributes:
        name: Full name of a module that stands for the group.
        kind: Kind of the units.
    """

    name: str
    kind: Kind

    @property
    @abstractmethod
    def units(self) -> int:
        """Number of units."""

    @property
    @abstractmethod
    def parameter_axes(self) -> tuple[ParameterAxis, ...]:
        """Parameters with rows of the units, and the rows' owners."""

    @abstractmethod
    def is_in(self, block: nn.Module) -> bool:
        """Return whether the group has units in a block, or is one."""

    @abstractmethod
    def hook(self, factor: Factor) -> list[RemovableHandle]:
        """Multiply the output of each unit by its factor.

        The hooks are no closures, so that a model with gates can be copied and pickled.
        """

    @classmethod
    @abstractmethod
    def stock_entries(
        cls,
        model: PreTrainedModel,
        groups: Sequence[Any],
        kept: Kept,
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return the config entries of a model with only the kept units.

        Args:
            model: The model as it is now, with or without weights.
            groups: All groups of this class; a config describes them together.
            kept: Kept units of each group.
            given: Entries that already changed because of kinds removed before.

        Raises:
            ShapeError: A stock config cannot describe it; the message names the constraint.
        """

    @classmethod
    @abstractmethod
    def cut(
        cls,
        model: PreTrainedModel,
        groups: Sequence[Any],
        kept: Kept,
        entries: Mapping[str, Any] | None,
    ) -> None:
        """Remove all other units, in place, and update the config.

        Args:
            model: The model that is changed.
            groups: All groups of this class; invalid afterwards.
            kept: Kept units of each group.
            entries: Entries from :meth:`stock_entries`. None (heads and neurons only) writes the
                kept units into the config instead.
        """

    def check_unequal(self) -> None:  # noqa: B027  most groups have nothing to check
        """Refuse a group that cannot differ from others of its stack.

        Raises:
            CheckpointError: transformers computes its attention outside of our function, so it
                cannot select the columns of a shared position bias.
        """

    def fewest(self, least: int) -> int:
        """Return the fewest units that can be kept.

        Raises:
            ConfigError: None are, and an attention of this family cannot be without heads.
        """
        return max(least, 1)

    def check_left(self, units: int) -> None:  # noqa: B027  most groups have nothing to check
        """Refuse a number of units with which the group cannot run.

        Raises:
            ShapeError: A router cannot choose among so few experts.
        """

    def comparable(
        self,
        scores: Float[Tensor, " U"],
        keep: Bool[Tensor, " U"],  # noqa: ARG002  of some kinds
    ) -> Float[Tensor, " U"]:
        """Return scores by which units of this group are compared.

        Args:
            scores: Score of each unit; higher is kept.
            keep: False for units that are removed already.
        """
        return scores

    @property
    def anchor(self) -> object:
        """Object that identifies the group after blocks before it are removed."""
        return self.name

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.parameter_axes[0].parameter.device

    @property
    def costs(self) -> Float[Tensor, " U"]:
        """Parameters removed with each unit, biases included; counted from the shapes."""
        total = torch.zeros(self.units, dtype=torch.float64)
        for parameter, axis, owner in self.parameter_axes:
            rows = torch.bincount(owner, minlength=self.units)
            total += rows * (parameter.numel() // max(parameter.shape[axis], 1))
        return total

    @property
    def parameters_per_unit(self) -> int:
        """Mean number of parameters removed with a unit, rounded."""
        return round(float(self.costs.mean()))

    def unit_multiple(self, of: int) -> int:
        """Return the unit count whose widths are multiples of ``of``."""
        rows = [int(torch.bincount(axis.owner)[0]) for axis in self.parameter_axes]
        return lcm(*(of // gcd(of, each) for each in rows))
