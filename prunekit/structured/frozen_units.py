"""Weights of pruned units that stay as they were while the rest of the model is trained.

A closed gate sends its unit no gradient, but momentum and weight decay would move the weights all
the same, and what is reactivated would not be what was pruned.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from prunekit.models.units.base import UnitGroup
from prunekit.structured.gate import Gate


class HookHandles:
    """Hooks in force until ``remove()``, or the end of a ``with`` block."""

    def __init__(self, handles: Iterable[RemovableHandle]) -> None:
        self._handles = [*handles]

    def remove(self) -> None:
        """Let the weights go free."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class FrozenUnits(HookHandles):
    """Holds the weights of closed units in each step of an optimizer; made by ``Gates.hold``.

    What the optimizer remembers of them is zeroed, entry by entry. Costs a copy of these weights
    during a step.
    """

    def __init__(
        self, places: Sequence[UnitGroup], gates: Mapping[str, Gate], optimizer: Optimizer
    ) -> None:
        self._places, self._gates = places, gates
        self._held: list[tuple[Tensor, int, Tensor, Tensor]] = []
        before = optimizer.register_step_pre_hook(lambda *_: self._take())
        after = optimizer.register_step_post_hook(lambda stepped, *_: self._put(stepped))
        super().__init__([before, after])

    @torch.no_grad()
    def _take(self) -> None:
        self._held = [
            (parameter, axis, rows, parameter.index_select(axis, rows))
            for place in self._places
            for gone in [~self._gates[place.name].keep.cpu()]
            for parameter, axis, owner in place.shares
            for rows in [gone[owner].nonzero().flatten().to(parameter.device)]
            if len(rows)
        ]

    @torch.no_grad()
    def _put(self, optimizer: Optimizer) -> None:
        for parameter, axis, rows, values in self._held:
            parameter.index_copy_(axis, rows, values)
            state: dict[Any, Any] = optimizer.state.get(parameter, {})
            for remembered in state.values():
                if isinstance(remembered, Tensor) and remembered.shape == parameter.shape:
                    remembered.index_fill_(axis, rows, 0)
        self._held.clear()
