"""Gates in a file: masks and factors by group name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit.checkpoint.header import read_header
from prunekit.checkpoint.reader import Checkpoint
from prunekit.checkpoint.safetensors_writer import write_shard
from prunekit.errors import CheckpointError, ConfigError
from prunekit.structured.selection import check_finite

if TYPE_CHECKING:
    from prunekit.models.units.kinds import Kind
    from prunekit.structured.gate import Gate

PARTS = ("keep", "value")


class GateState(NamedTuple):
    """Mask and factors of the units of one group."""

    keep: Bool[Tensor, " U"]
    value: Float[Tensor, " U"]

    @classmethod
    def of(cls, gate: Gate) -> GateState:
        """Return a copy of the state of a gate, on its device."""
        return cls(gate.keep.clone(), gate.value.detach().clone())

    @torch.no_grad()
    def restore(self, gate: Gate) -> None:
        """Copy the state into the tensors of a gate."""
        gate.keep.copy_(self.keep)
        gate.value.copy_(self.value)


def write_gates(path: str | os.PathLike[str], kind: Kind, gates: Mapping[str, Gate]) -> None:
    """Write the states of gates to a safetensors file, atomically.

    Args:
        path: The file.
        kind: Kind of the units.
        gates: The gate of each group, by group name.

    Raises:
        ConfigError: There is no such folder, or the path is one.
        CapacityError: The file system refused a write.
    """
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir():
        raise ConfigError(f"{file}: a file is written, in a folder that exists.")
    states = {name: GateState.of(gate) for name, gate in gates.items()}
    write_shard(
        file,
        {
            _key(kind, name, part): getattr(state, part).cpu()
            for name, state in states.items()
            for part in PARTS
        },
    )


def read_gates(
    path: str | os.PathLike[str], kind: Kind, gates: Mapping[str, Gate]
) -> dict[str, GateState]:
    """Return the states that a file holds for gates, by group name.

    Args:
        path: The file.
        kind: Kind of the units.
        gates: The gate of each group, by group name.

    Raises:
        CheckpointError: The file cannot be read, or is of other units.
    """
    file = Path(path)
    entries = read_header(file)
    wanted = {_key(kind, name, part) for name in gates for part in PARTS}
    if differ := sorted(wanted ^ entries.keys()):
        where = "not in the model" if differ[0] in entries else "not in the file"
        raise CheckpointError(
            f"{file}: {differ[0]} is {where}, so these are no gates on the {kind} of this model. "
            "Load them into the model, and the kind, that they were saved of."
        )
    for name, gate in gates.items():
        for part in PARTS:
            entry = entries[_key(kind, name, part)]
            units = tuple(gate.keep.shape)
            dtype = torch.bool if part == "keep" else torch.float32
            if (entry.shape, entry.dtype) != (units, dtype):
                raise CheckpointError(
                    f"{file}: {_key(kind, name, part)} is {entry.dtype} of shape "
                    f"{[*entry.shape]}; the model has {units[0]} {kind} there. Units were removed "
                    "since, or the model is another."
                )
    read = Checkpoint(file.parent, {}, entries, entries).read(wanted)
    states = {name: GateState(*(read[_key(kind, name, part)] for part in PARTS)) for name in gates}
    for name, state in states.items():
        if bool((state.keep.view(torch.uint8) > 1).any()):
            raise CheckpointError(
                f"{file}: {_key(kind, name, 'keep')} has bytes other than 0 and 1, so the file is "
                "damaged. Save the gates again."
            )
        try:
            check_finite(f"{name}: gate", state.value)
        except ConfigError as error:
            raise CheckpointError(f"{file}: {error}") from error
    return states


def _key(kind: Kind, name: str, part: str) -> str:
    return f"{kind}/{name}/{part}"
