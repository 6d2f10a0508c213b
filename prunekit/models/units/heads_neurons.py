"""Heads and neurons of a model: which rows and columns of which linears belong to each.

A unit is what can be removed by itself: a neuron, a head, or, under grouped queries, a key head
with the query heads that share it. A site is the attention or feed-forward whose units they are.

Shapes: U units, P parts of a unit (the query heads of a group), R rows or columns of a part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from prunekit.architectures import Attention, FeedForward, Stack, find
from prunekit.architectures.base import Count
from prunekit.architectures.coverage import ADVICE, holds, prefix
from prunekit.errors import CheckpointError
from prunekit.models.units.base import Factor, ParameterAxis, UnitGroup
from prunekit.models.units.kinds import Kind


@dataclass(frozen=True)
class UnitIndex:
    """The outputs, or the inputs, of a linear that belong to each unit."""

    linear: nn.Module
    index: Int[Tensor, "U P R"]


@dataclass(frozen=True)
class Site(UnitGroup):
    """One attention or feed-forward and its heads or neurons.

    Attributes:
        name: Full name of the attention, or of the linear that reads the neurons.
        kind: What the units are.
        stack: The stack whose block it is in.
        module: The attention, or that linear.
        declared: Where the family keeps it.
        writers: Outputs of linears that make the units.
        reader: Inputs of the one linear that reads them.
    """

    stack: Stack
    module: nn.Module
    declared: Attention | FeedForward
    writers: tuple[UnitIndex, ...]
    reader: UnitIndex

    @property
    @override
    def units(self) -> int:
        return len(self.reader.index)

    @property
    def span(self) -> int:
        """Inputs of the reader that belong to one unit."""
        return self.reader.index[0].numel()

    @property
    @override
    def shares(self) -> tuple[ParameterAxis, ...]:
        found = [
            ParameterAxis(_weight(self.reader.linear), _axis(self.reader.linear, 1), self.owner)
        ]
        for linear in dict.fromkeys(part.linear for part in self.writers):
            owner = torch.empty(len(matrix(linear)), dtype=torch.int64)
            for part in self.writers:
                if part.linear is linear:
                    rows = part.index[0].numel()
                    units = torch.arange(self.units).repeat_interleave(rows)
                    owner[part.index.flatten()] = units
            found.append(ParameterAxis(_weight(linear), _axis(linear, 0), owner))
            if linear.bias is not None:
                found.append(ParameterAxis(cast("nn.Parameter", linear.bias), 0, owner))
        return tuple(found)

    @override
    def hook(self, factor: Factor) -> list[RemovableHandle]:
        owner = self.owner.to(self.device)

        def scale(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            (x,) = inputs
            each = factor()[..., owner].to(x.dtype)
            if each.ndim > x.ndim:  # one a sample, where batch and tokens were joined
                each = each.flatten(0, 1).repeat_interleave(len(x) // len(each), 0)
            return (x * each,)

        return [self.reader.linear.register_forward_pre_hook(scale)]

    @property
    def owner(self) -> Int[Tensor, " I"]:
        """The unit that each input of the reader belongs to."""
        owner = torch.empty(self.reader.index.numel(), dtype=torch.int64)
        owner[self.reader.index.flatten()] = torch.arange(self.units).repeat_interleave(self.span)
        return owner


def sites(model: PreTrainedModel, kind: Kind) -> list[Site]:
    """Return the sites of one kind, block by block in run order.

    Raises:
        CheckpointError: The family is not declared, or not with its heads and neurons.
    """
    found = known(model, kind)
    if not found:
        raise CheckpointError(
            f"{type(model).__name__}: nothing says where models of type "
            f"{model.config.model_type!r} keep their {kind}, so none can be removed. {ADVICE}"
        )
    return found


def known(model: PreTrainedModel, kind: Kind) -> list[Site]:
    """Return the same, or nothing where nothing is said of them."""
    of_block = heads_of if kind == "heads" else neurons_of
    return [
        site for name, block, stack in _blocks(model) for site in of_block(f"{name}.", block, stack)
    ]


def matrix(linear: nn.Module) -> Float[Tensor, "O I"]:
    """Return a view of a linear's weight, outputs first."""
    return oriented(linear, cast("Tensor", linear.weight))


def _weight(linear: nn.Module) -> nn.Parameter:
    return cast("nn.Parameter", linear.weight)


def _axis(linear: nn.Module, axis: int) -> int:
    """Return where the outputs (0) or inputs (1) of a linear lie in its weight."""
    return 1 - axis if isinstance(linear, Conv1D) else axis


def oriented(linear: nn.Module, value: Tensor) -> Float[Tensor, "O I"]:
    """Return what lies as a linear's weight does, outputs first."""
    return value.T if isinstance(linear, Conv1D) else value


def counts(site: Site, units: int) -> dict[Count, int]:
    """Return what modules and configs say of an attention with so many units."""
    declared = cast("Attention", site.declared)
    size = cast("int", getattr(site.module, declared.size))
    heads = units * site.span // size
    return {"heads": heads, "groups": units, "size": size, "width": heads * size}


def heads_of(name: str, block: nn.Module, stack: Stack) -> Iterator[Site]:
    """Yield the sites of one block's heads; ``name`` goes before theirs."""
    for declared in stack.attentions:
        module = block.get_submodule(declared.module)
        reader = block.get_submodule(declared.output)
        size = cast("int", getattr(module, declared.size))
        columns = torch.arange(matrix(reader).shape[1]).view(-1, size)
        query, key, value = _projections(block, declared, columns.shape)
        units = len(key.index)
        yield Site(
            f"{name}{declared.module}",
            "heads",
            stack,
            module,
            declared,
            (UnitIndex(query.linear, query.index.view(units, -1, size)), key, value),
            UnitIndex(reader, columns.view(units, -1, size)),
        )


def _projections(block: nn.Module, declared: Attention, shape: torch.Size) -> tuple[UnitIndex, ...]:
    """Return the outputs of query, key and value, each [heads, 1, size]."""
    heads, size = shape
    linears = [block.get_submodule(name) for name in (declared.query, declared.key, declared.value)]
    rows = [torch.arange(len(matrix(linear))) for linear in linears]
    if declared.interleaved:
        parts = [*rows[0].view(heads, 3, size).unbind(1)]
    elif declared.query == declared.key:
        others = (len(rows[0]) - heads * size) // 2
        parts = rows[0].split([heads * size, others, others])
    else:
        parts = rows
    return tuple(
        UnitIndex(linear, part.view(-1, 1, size))
        for linear, part in zip(linears, parts, strict=True)
    )


def neurons_of(name: str, block: nn.Module, stack: Stack) -> Iterator[Site]:
    """Yield the sites of one block's neurons; ``name`` goes before theirs."""
    for declared in stack.feed_forwards:
        reader = block.get_submodule(declared.output)
        columns = torch.arange(matrix(reader).shape[1]).view(-1, 1, 1)
        inputs = [block.get_submodule(path) for path in declared.inputs if holds(block, path)]
        writers = tuple(
            UnitIndex(linear, start + columns)
            for linear in inputs
            for start in range(0, len(matrix(linear)), len(columns))
        )
        read = UnitIndex(reader, columns)
        yield Site(f"{name}{declared.output}", "neurons", stack, reader, declared, writers, read)


def _blocks(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, Stack]]:
    for stack in find(model).stacks:
        for index, block in model.base_model.get_submodule(stack.blocks).named_children():
            yield f"{prefix(model)}{stack.blocks}.{index}", block, stack
