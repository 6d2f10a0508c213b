"""Gates on all unit groups of one kind, with an undo history.

Shapes: U units of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from operator import index
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from prunekit.architectures.adapters import bare_model
from prunekit.errors import ConfigError
from prunekit.models.in_memory import check_in_memory, is_flattened
from prunekit.models.units.find import unit_groups
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.models.units.kinds import Kind
from prunekit.structured.finalize import kept_units, linear_groups_of
from prunekit.structured.frozen_units import FrozenUnits
from prunekit.structured.gate import Gate
from prunekit.structured.gate_file import GateState, read_gates, write_gates
from prunekit.structured.guarded_save import ATTACHED, GuardedSave
from prunekit.structured.scheduled import torch_optimizer
from prunekit.structured.selection import check_covers

if TYPE_CHECKING:
    from prunekit.structured.gradual_units import GradualUnits

ACTIVE = 0.01
"""A unit with a factor above this counts as active."""


def attached_gates(model: PreTrainedModel, kind: Kind) -> GateSet | None:
    """Return the gates attached to a model's units of one kind.

    None if there are none.
    """
    return getattr(bare_model(model), ATTACHED, {}).get(kind)


class GateSet:
    """Gates on all units of one kind of a model.

    Attributes:
        model: The model of transformers, without wrappers of peft.
        kind: Kind of the units.
        groups: Their groups, in run order; a layer is an index into these.
        gates: The gate of each group, by group name.
        dense_saves: Whether ``save_pretrained`` of the model writes the weights as they are, though
            gates are not 1. The gates then have to be saved too.
    """

    dense_saves = False

    def __init__(
        self, model: PreTrainedModel, kind: Kind, device: torch.device | None = None
    ) -> None:
        """Attach gates to all units of a kind, open.

        Args:
            model: The model.
            kind: Kind of the units.
            device: Device on which blocks of an empty model will run; None for a model whose
                weights are in memory.

        Raises:
            ConfigError: The model has gates on this kind already, or is not in memory though it
                should be.
        """
        if device is None:
            check_in_memory(model)
        if attached_gates(model, kind):
            raise ConfigError(
                f"{kind}: the model has gates on them already; prunekit.{kind}(model) returns them."
            )
        self.model = bare_model(model)  # whose forward runs the adapters of peft too
        self.kind: Kind = kind
        self._pruner: GradualUnits | None = None
        self._device = device
        self._attach()

    @property
    def linear_groups(self) -> list[LinearUnitGroup]:
        """The groups of heads and neurons, which one linear reads."""
        return linear_groups_of(self.groups)

    @property
    def units(self) -> int:
        """Number of units of all groups."""
        return sum(group.units for group in self.groups)

    @property
    def closed(self) -> int:
        """Number of pruned units."""
        return sum(int((~gate.keep).sum()) for gate in self.gates.values())

    @property
    def keep(self) -> dict[str, Bool[Tensor, " U"]]:
        """Mask of unpruned units, by group name: copies on the CPU."""
        return {name: gate.keep.to("cpu", copy=True) for name, gate in self.gates.items()}

    @property
    def kept(self) -> dict[str, list[int]]:
        """The units that are not pruned, by group name, in ascending order."""
        return kept_units(self.gates)

    def active(self, threshold: float = ACTIVE) -> int:
        """Return the number of units with a factor above ``threshold``."""
        return sum(int((gate.factor > threshold).sum()) for gate in self.gates.values())

    def gate(self, layer: int, unit: int, value: float) -> None:
        """Multiply the output of a unit by ``value``.

        Args:
            layer: Index of the group.
            unit: Index of the unit in the group.
            value: The factor.

        Raises:
            ConfigError: There is no such unit, or the value is not a finite number.
        """
        gate = self._gate(layer, unit)
        try:
            factor = float(value)
        except (TypeError, ValueError, RuntimeError):
            factor = math.nan
        if not math.isfinite(factor):
            raise ConfigError(f"gate: {value!r} is not a finite number.")
        self._remember()
        with torch.no_grad():
            gate.value[unit] = factor

    def close(self, keep: Mapping[str, Bool[Tensor, " U"]]) -> None:
        """Close the gates of all units that are not kept.

        Raises:
            ConfigError: A group has no mask of its units.
        """
        check_covers("keep", keep, self.gates, torch.bool)
        self._remember()
        for name, gate in self.gates.items():
            gate.keep &= keep[name].to(gate.keep.device)

    def reactivate(self, units: Iterable[tuple[int, int]]) -> None:
        """Open pruned units (layer, unit) again, with the factor that they had.

        Raises:
            ConfigError: There is no such unit.
        """
        try:
            pairs = [(layer, unit) for layer, unit in units]
        except (TypeError, ValueError):
            raise ConfigError(f"reactivate: {units!r} are not pairs (layer, unit).") from None
        found = [(self._gate(layer, unit), unit) for layer, unit in pairs]
        self._remember()
        for gate, unit in found:
            gate.keep[unit] = True

    def undo(self) -> None:
        """Revert the last ``prune``, ``close``, ``reactivate``, ``gate`` or ``load``.

        Raises:
            ConfigError: There is no step to revert.
        """
        if not self._history:
            raise ConfigError("undo: nothing is left to take back.")
        for gate, state in zip(self.gates.values(), self._history.pop(), strict=True):
            state.restore(gate)

    def save(self, path: str | PathLike[str]) -> None:
        """Write masks and factors of all units to a safetensors file, atomically.

        With the weights of the model it is all that is needed to continue, in another process too.

        Raises:
            ConfigError: There is no such folder, or the path is one.
            CapacityError: The file system refused a write.
        """
        write_gates(path, self.kind, self.gates)

    def load(self, path: str | PathLike[str]) -> None:
        """Set masks and factors to those that :meth:`save` wrote; ``undo`` reverts it.

        Raises:
            CheckpointError: The file cannot be read, or is of other units. Nothing is changed.
        """
        states = read_gates(path, self.kind, self.gates)
        self._remember()
        for name, state in states.items():
            state.restore(self.gates[name])

    def relocate(self) -> dict[str, str]:
        """Find the groups again after a removal of blocks.

        The undo history is cleared.

        Returns:
            The old name of each group, by its new name.
        """
        before = {group.anchor: (group.name, self.gates[group.name]) for group in self.groups}
        self._detach()
        self._attach()
        names = {}
        for group in self.groups:
            names[group.name], old = before[group.anchor]
            gate = self.gates[group.name]
            gate.value, gate.keep = old.value, old.keep
        return names

    def hold(self, optimizer: Optimizer) -> FrozenUnits:
        """Keep the weights of pruned units constant during training.

        Returns:
            A handle that ends this by ``remove()`` or at the end of a ``with`` block.

        Raises:
            ConfigError: It is no optimizer of torch, or the weights are parts of flat tensors.
        """
        if is_flattened(self.model):
            raise ConfigError(
                "hold: FSDP 1 and ZeRO-3 keep weights in flat tensors, in which those of a unit "
                "cannot be found. Use FSDP 2 (fully_shard) or DDP. Gates remain closed without "
                "hold too, but the weights of their units then change."
            )
        return FrozenUnits(self, torch_optimizer(optimizer))

    def __enter__(self) -> Self:
        """Return itself; the gates are removed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Remove all gates; the weights alone then determine the output.

        A pruner of ``during`` is removed too.
        """
        if self._pruner is not None:
            self._pruner.remove()
        self._detach()

    def _detach(self) -> None:
        for gate in self.gates.values():
            gate.detach()
        attached = vars(self.model).get(ATTACHED, {})
        attached.pop(self.kind, None)
        if not attached:
            GuardedSave.remove(self.model)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes; no optimizer trains a copy."""
        return {**vars(self), "_pruner": None}

    def _attach(self) -> None:
        self.groups = unit_groups(self.model, self.kind)
        self.gates = {group.name: Gate(group, self._device) for group in self.groups}
        self._history: list[list[GateState]] = []
        # In the model itself, so that a copy of it has gates of its own and knows them.
        vars(self.model).setdefault(ATTACHED, {})[self.kind] = self
        GuardedSave.install(self.model)

    def _gate(self, layer: int, unit: int) -> Gate:
        try:
            layer, unit = index(layer), index(unit)
        except TypeError:
            raise ConfigError(f"({layer!r}, {unit!r}): layer and unit are whole numbers.") from None
        if not 0 <= layer < len(self.groups) or not 0 <= unit < self.groups[layer].units:
            raise ConfigError(
                f"({layer}, {unit}): there is no such unit; layers go to {len(self.groups) - 1}, "
                f"units to {max(group.units for group in self.groups) - 1}."
            )
        return self.gates[self.groups[layer].name]

    def _remember(self) -> None:
        self._history.append([GateState.of(gate) for gate in self.gates.values()])
