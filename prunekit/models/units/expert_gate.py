"""Routing as if some experts were not there.

While a module with a router and experts runs, its router has only the rows of the open experts, so
that other experts take the tokens of the closed ones, exactly as after their removal: a weight of 0
alone would leave the shares of the others as they are. The numbers that it chooses are then those
among the open experts, and are translated for the experts, whose matrices are left as they are.

Shapes: E experts, T tokens, K experts per token, B samples, D features.
"""

from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunekit.errors import CheckpointError
from prunekit.models.units.base import Factor
from prunekit.models.units.routers import Router


class ExpertGate:
    """Runs one module of experts with a factor for each expert.

    An expert with the factor 0 gets no token. Other factors multiply the outputs.
    """

    def __init__(self, name: str, factor: Factor, router: Router) -> None:
        """Prepare the gate; nothing is attached yet.

        Args:
            name: Full name of the experts, for messages.
            factor: Returns the factors, float32 [E] or [B, 1, E].
            router: The router.
        """
        self._name, self._factor, self._router = name, factor, router
        self._open: Int[Tensor, " O"] | None = None
        self._before: list[Tensor] = []

    def attach(self, experts: nn.Module) -> list[RemovableHandle]:
        """Attach the hooks and return their handles."""
        return [
            self._router.module.register_forward_pre_hook(self._narrow),
            self._router.module.register_forward_hook(self._restore, always_call=True),
            experts.register_forward_pre_hook(self._translate),
        ]

    def _narrow(self, *_: object) -> None:
        """Give the router the rows of the open experts only."""
        factor = self._factor().detach()
        is_open = (factor != 0).view(-1, factor.shape[-1]).any(0)
        if bool(is_open.all()):
            return
        self._router.check_open(self._name, is_open)
        self._open = found = is_open.nonzero().flatten()
        self._before = [axis.tensor for axis in self._router.axes]
        for axis, tensor in zip(self._router.axes, self._before, strict=True):
            axis.set(tensor.index_select(axis.axis, found.to(tensor.device)))
        self._router.set_count(len(found))

    def _restore(self, *_: object) -> None:
        """Give the router its tensors back, also after an error."""
        if self._before:
            for axis, tensor in zip(self._router.axes, self._before, strict=True):
                axis.set(tensor)
            self._router.set_count(self._factor().shape[-1])
        self._open, self._before = None, []

    def _translate(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Translate chosen numbers, and multiply shares by the factors."""
        hidden, chosen, shares = routing(self._name, inputs)
        if self._open is not None:
            chosen = self._open.to(chosen.device)[chosen]
        factor = self._factor().to(shares)
        if factor.ndim > 1:  # one for each sample, whose tokens are one below the other
            rows = factor.flatten(0, 1).repeat_interleave(len(chosen) // len(factor), 0)
            return hidden, chosen, shares * rows.gather(1, chosen)
        return hidden, chosen, shares * factor[chosen]


def routing(name: str, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs of experts: hidden states, their numbers, their shares.

    Args:
        name: Full name of the experts, for the message.
        inputs: Positional arguments of the call: [T, D], [T, K] and [T, K].

    Raises:
        CheckpointError: The experts are called in another way.
    """
    if len(inputs) != 3 or inputs[1].shape != inputs[2].shape or inputs[1].ndim != 2:
        raise CheckpointError(
            f"{name}: they are not called with hidden states, numbers of experts and their shares, "
            "so single ones cannot be closed or ranked."
        )
    return inputs
