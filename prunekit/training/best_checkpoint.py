"""The best weights of a training, by the held-out loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.models.in_memory import local_part


class BestCheckpoint:
    """The weights whose held-out loss was the lowest so far.

    Attributes:
        loss: The lowest held-out loss; None before the first.
        stale: Measurements since then.
    """

    def __init__(self, weights: Callable[[], Sequence[Tensor]]) -> None:
        """``weights`` lists them, the same ones from the first :meth:`update` on."""
        self.loss: float | None = None
        self.stale = 0
        self._weights = weights
        self._copies: list[Tensor] = []

    def update(self, loss: float) -> None:
        """Store the current weights if their loss is the lowest."""
        self.stale += 1
        if self.loss is None:
            self._copies = [local_part(each).detach().clone() for each in self._weights()]
        elif loss < self.loss:
            _copy(self._weights(), self._copies)
        else:
            return
        self.loss, self.stale = loss, 0

    def restore(self) -> None:
        """Copy the stored weights back."""
        _copy(self._copies, self._weights())

    def state_dict(self) -> dict[str, Any]:
        """Return loss, count and stored weights."""
        return {"loss": self.loss, "stale": self.stale, "weights": self._copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, with the weights of its step."""
        self.loss, self.stale = state["loss"], state["stale"]
        pairs = zip(state["weights"], self._weights(), strict=self.loss is not None)
        self._copies = [stored.to(weight.device, copy=True) for stored, weight in pairs]


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for value, destination in zip(source, target, strict=True):
        local_part(destination).copy_(local_part(value))
