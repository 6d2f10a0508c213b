"""Which outputs or inputs of a linear belong to which unit.

Shapes: U units, P parts of a unit (the query heads of a group), R rows or columns of a part, N
outputs or inputs of a linear.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prunekit.architectures import Attention, FeedForward
from prunekit.architectures.coverage import has_module
from prunekit.models.orientation import weight_matrix
from prunekit.models.units.narrowing import narrow_linear


@dataclass(frozen=True)
class UnitIndex:
    """Outputs or inputs of a linear that belong to each unit."""

    linear: nn.Module
    index: Int[Tensor, "U P R"]


def owner_of(parts: Iterable[Int[Tensor, "U P R"]]) -> Int[Tensor, " N"]:
    """Return the unit that each index belongs to."""
    indices = [part.flatten(1) for part in parts]
    units = torch.arange(len(indices[0]))
    owner = torch.empty(sum(index.numel() for index in indices), dtype=torch.int64)
    for index in indices:
        owner[index.flatten()] = units.repeat_interleave(index.shape[1])
    return owner


def output_owner(linear: nn.Module, writers: Iterable[UnitIndex]) -> Int[Tensor, " N"]:
    """Return the unit that each output of a linear belongs to.

    Args:
        linear: One of the linears that write the units.
        writers: Outputs of all of them.
    """
    return owner_of(part.index for part in writers if part.linear is linear)


def keep_units(writers: Sequence[UnitIndex], reader: UnitIndex, keep: Sequence[int]) -> None:
    """Remove all other units from the linears that write and read them.

    Args:
        writers: Outputs of the linears that write the units.
        reader: Inputs of the linear that reads them.
        keep: The kept units, at least one.
    """
    removed = torch.ones(len(reader.index), dtype=torch.bool)
    removed[list(keep)] = False
    for linear in {part.linear: None for part in writers}:
        rows = torch.ones(len(weight_matrix(linear)), dtype=torch.bool)
        for part in writers:
            if part.linear is linear:
                rows[part.index[removed].flatten()] = False
        narrow_linear(linear, rows.nonzero().flatten(), outputs=True)
    narrow_linear(reader.linear, reader.index[~removed].flatten(), outputs=False)


def head_index(block: nn.Module, declared: Attention) -> tuple[tuple[UnitIndex, ...], UnitIndex]:
    """Return the outputs that write heads, and inputs that read them."""
    reader = block.get_submodule(declared.output)
    size = cast("int", getattr(block.get_submodule(declared.module), declared.size))
    columns = torch.arange(weight_matrix(reader).shape[1]).view(-1, size)
    query, key, value = projections(block, declared, columns.shape)
    units = len(key.index)
    writers = UnitIndex(query.linear, query.index.view(units, -1, size)), key, value
    return writers, UnitIndex(reader, columns.view(units, -1, size))


def neuron_index(
    block: nn.Module, declared: FeedForward
) -> tuple[tuple[UnitIndex, ...], UnitIndex]:
    """Return the outputs that write neurons, and inputs that read them."""
    reader = block.get_submodule(declared.output)
    columns = torch.arange(weight_matrix(reader).shape[1]).view(-1, 1, 1)
    inputs = [block.get_submodule(path) for path in declared.inputs if has_module(block, path)]
    writers = tuple(
        UnitIndex(linear, start + columns)
        for linear in inputs
        for start in range(0, len(weight_matrix(linear)), len(columns))
    )
    return writers, UnitIndex(reader, columns)


def projections(block: nn.Module, declared: Attention, shape: torch.Size) -> tuple[UnitIndex, ...]:
    """Return the outputs of query, key and value, each [heads, 1, size].

    Args:
        block: The block.
        declared: Declaration of the attention.
        shape: Number of query heads, and features of each.
    """
    heads, size = shape
    linears = [block.get_submodule(name) for name in (declared.query, declared.key, declared.value)]
    rows = [torch.arange(len(weight_matrix(linear))) for linear in linears]
    if declared.interleaved:
        groups = (len(rows[0]) // size - heads) // 2
        together = rows[0].view(groups, -1, size)  # its queries, a key, a value
        parts = [together[:, :-2], together[:, -2], together[:, -1]]
    elif declared.query == declared.key:
        key_width = (len(rows[0]) - heads * size) // 2
        parts = rows[0].split([heads * size, key_width, key_width])
    else:
        parts = rows
    return tuple(
        UnitIndex(linear, part.reshape(-1, 1, size))
        for linear, part in zip(linears, parts, strict=True)
    )
