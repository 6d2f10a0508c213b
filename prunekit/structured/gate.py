"""Gates: a factor on what each unit gives, differentiable, exactly absent at 1.

Of heads and neurons it multiplies the inputs of the linear that reads them, so that it is the same
for every family and every implementation of attention. A gate of 0 is the removal of the unit.

Shapes: U units, B samples.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit.models.units.base import UnitGroup


class Gate:
    """The gate of the units of one place.

    Attributes:
        value: Factors, float32 [U], or [B, 1, U] for a factor a sample; may require a gradient.
        keep: False for units that are pruned: their factor is 0, whatever ``value`` is, and
            ``value`` gets no gradient there, so that training cannot open them again.
    """

    def __init__(self, place: UnitGroup) -> None:
        units, device = place.units, place.device
        self.value: Float[Tensor, "*B U"] = torch.ones(units, device=device)
        self.keep: Bool[Tensor, " U"] = torch.ones(units, dtype=torch.bool, device=device)
        self._handles = place.hook(lambda: self.factor)

    @property
    def factor(self) -> Float[Tensor, "*B U"]:
        """What each unit is multiplied by."""
        return self.value * self.keep

    def detach(self) -> None:
        """Take the gate out of the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def holding(self, value: Float[Tensor, "*B U"]) -> Iterator[Tensor]:
        """Put ``value`` in place of the gate's for a while."""
        before, self.value = self.value, value
        try:
            yield value
        finally:
            self.value = before
