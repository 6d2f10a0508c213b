"""Weights of pruned units kept constant during training.

The gradient through a closed gate is zero, but momentum and weight decay would still move the
weights of the unit, so that a reactivated unit would differ from the pruned one.

Shapes: R rows of a parameter, L those of them in this process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Int
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from prunekit.models.in_memory import is_distributed

if TYPE_CHECKING:
    from prunekit.structured.gate_set import GateSet


class HookHandles:
    """Hooks that are active until ``remove()`` or a context ends."""

    def __init__(self, handles: Iterable[RemovableHandle]) -> None:
        self._handles = [*handles]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class FrozenUnits(HookHandles):
    """Restores the weights of closed units after each optimizer step; see ``GateSet.hold``.

    The optimizer state of these weights is zeroed entry by entry. Costs a copy of the weights
    during a step.
    """

    def __init__(self, gates: GateSet, optimizer: Optimizer) -> None:
        self._gates = gates
        self._saved: list[tuple[Tensor, int, Tensor, Tensor]] = []
        before = optimizer.register_step_pre_hook(lambda *_: self._save())
        after = optimizer.register_step_post_hook(lambda stepped, *_: self._restore(stepped))
        super().__init__([before, after])

    @torch.no_grad()
    def _save(self) -> None:
        # The groups of now: a removal replaces them.
        self._saved = [
            (parameter, axis, rows, local.index_select(axis, index))
            for group in self._gates.groups
            for closed in [~self._gates.gates[group.name].keep.cpu()]
            if bool(closed.any())
            for parameter, axis, owner in group.parameter_axes
            for rows in [closed[owner].nonzero().flatten().to(parameter.device)]
            for local, index in [_local_rows(parameter, axis, rows)]
            if len(index)
        ]

    @torch.no_grad()
    def _restore(self, optimizer: Optimizer) -> None:
        for parameter, axis, rows, values in self._saved:
            local, index = _local_rows(parameter, axis, rows)
            local.index_copy_(axis, index, values)
            state: dict[Any, Any] = optimizer.state.get(parameter, {})
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    local, index = _local_rows(value, axis, rows)
                    local.index_fill_(axis, index, 0)
        self._saved.clear()


def _local_rows(
    value: Tensor, axis: int, rows: Int[Tensor, " R"]
) -> tuple[Tensor, Int[Tensor, " L"]]:
    """Return this process's part of a tensor and its rows.

    Args:
        value: A tensor, whole or sharded by FSDP 2.
        axis: Axis of the rows.
        rows: Indices of the whole tensor.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not is_distributed(value):
        return value, rows
    local = value.to_local()
    _, first = compute_local_shape_and_global_offset(
        value.shape, value.device_mesh, value.placements
    )
    rows = rows - first[axis]
    return local, rows[(rows >= 0) & (rows < local.shape[axis])]
