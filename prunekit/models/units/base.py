"""TODO-DOC prunekit/models/units/base.py (out of prunekit/sites.py)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, lcm
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunekit.models.units.kinds import Kind

Factor = Callable[[], Float[Tensor, "*B U"]]
"""What each unit is multiplied by, float32 [U], or [B, 1, U] for a factor a sample."""


class ParameterAxis(NamedTuple):
    """Which unit the rows of a parameter along an axis go with: all of them go with one."""

    parameter: nn.Parameter
    axis: int
    owner: Int[Tensor, " R"]


@dataclass(frozen=True)
class UnitGroup(ABC):
    """Where units of one kind are.

    Attributes:
        name: Full name of a module that stands for it.
        kind: What the units are.
    """

    name: str
    kind: Kind

    @property
    @abstractmethod
    def units(self) -> int:
        """How many units there are."""

    @property
    @abstractmethod
    def shares(self) -> tuple[ParameterAxis, ...]:
        """What belongs to the units, of each parameter that is theirs."""

    @abstractmethod
    def hook(self, factor: Factor) -> list[RemovableHandle]:
        """Multiply what each unit gives by its factor, whenever the model runs."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.shares[0].parameter.device

    @property
    def costs(self) -> Float[Tensor, " U"]:
        """Parameters that go with each unit, biases included; counted from the shapes."""
        total = torch.zeros(self.units, dtype=torch.float64)
        for parameter, axis, owner in self.shares:
            rows = torch.bincount(owner, minlength=self.units)
            total += rows * (parameter.numel() // max(parameter.shape[axis], 1))
        return total

    def multiple(self, of: int) -> int:
        """Return of what numbers of units every width that they make up is a multiple of ``of``."""
        rows = [int(torch.bincount(share.owner)[0]) for share in self.shares]
        return lcm(*(of // gcd(of, each) for each in rows))

    @property
    def parameters(self) -> int:
        """Parameters that go with one unit, on average."""
        return round(float(self.costs.mean()))
