"""Differentiable factors on the outputs of units.

A factor of 1 changes no bit of the output. For heads and neurons the factor multiplies the inputs
of the linear that reads them, so it works for every family and every attention implementation. A
factor of 0 is the removal of the unit.

Shapes: U units, B samples.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit.models.units.base import UnitGroup


class Gate:
    """The gate of the units of one group.

    Attributes:
        value: Factors, float32 [U], or [B, 1, U] for one factor per sample; may require a gradient.
        keep: False for pruned units. Their factor is 0 for any ``value``, which gets no gradient
            there, so training cannot open them again.
    """

    def __init__(self, group: UnitGroup, device: torch.device | None = None) -> None:
        """Attach a gate, open, to the model.

        Args:
            group: The units.
            device: Device on which the model runs, if its weights are not in memory.
        """
        units, device = group.units, device or group.device
        self.value: Float[Tensor, "*B U"] = torch.ones(units, device=device)
        self.keep: Bool[Tensor, " U"] = torch.ones(units, dtype=torch.bool, device=device)
        self._handles = group.hook(self._current)

    @property
    def factor(self) -> Float[Tensor, "*B U"]:
        """The current factor of each unit."""
        return self.value * self.keep

    def _current(self) -> Tensor:
        return self.factor

    def detach(self) -> None:
        """Remove the gate from the model."""
        for handle in self._handles:
            handle.remove()

    def holding(self, value: Float[Tensor, "*B U"]) -> "Holding":
        """Use ``value`` instead of the gate's value within the context."""
        return Holding(self, value)


class Holding:
    """Context in which a gate has another value; reentrant."""

    def __init__(self, gate: Gate, value: Float[Tensor, "*B U"]) -> None:
        self._gate, self._value, self._before = gate, value, gate.value

    def __enter__(self) -> Tensor:
        self._before, self._gate.value = self._gate.value, self._value
        return self._value

    def __exit__(self, *_: object) -> None:
        self._gate.value = self._before
