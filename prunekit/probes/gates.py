"""Gates: a factor on what each head or neuron gives, differentiable, exactly absent at 1.

A gate multiplies the inputs of the linear that reads the units, so that it is the same for every
family and every implementation of attention, and a gate of 0 is the removal of the unit.

Shapes: U units, B samples, T tokens, I inputs of the linear.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from prunekit.sites import Site, matrix


class Gate:
    """The gate of one site.

    Attributes:
        value: Factors, float32 [U], or [B, 1, U] for a factor a sample; may require a gradient.
        keep: False for units that are pruned: their factor is 0, whatever ``value`` is, and
            ``value`` gets no gradient there, so that training cannot open them again.
    """

    def __init__(self, site: Site) -> None:
        device = matrix(site.reader.linear).device
        self.value: Float[Tensor, "*B U"] = torch.ones(site.units, device=device)
        self.keep: Bool[Tensor, " U"] = torch.ones(site.units, dtype=torch.bool, device=device)
        self._owner = site.owner.to(device)
        self._handle = site.reader.linear.register_forward_pre_hook(self._scale)

    @property
    def factor(self) -> Float[Tensor, "*B U"]:
        """What each unit is multiplied by."""
        return self.value * self.keep

    def detach(self) -> None:
        """Take the gate out of the model."""
        self._handle.remove()

    @contextmanager
    def holding(self, value: Float[Tensor, "*B U"]) -> Iterator[Tensor]:
        """Put ``value`` in place of the gate's for a while."""
        before, self.value = self.value, value
        try:
            yield value
        finally:
            self.value = before

    def _scale(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = inputs
        factor = self.factor[..., self._owner].to(x.dtype)
        if factor.ndim > x.ndim:  # one a sample, where batch and tokens were joined
            factor = factor.flatten(0, 1).repeat_interleave(len(x) // len(factor), 0)
        return (x * factor,)
