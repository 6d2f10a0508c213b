"""Whole blocks of a stack as units.

Shapes: U blocks, B samples, T tokens, D features of the hidden states.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from typing_extensions import override

from prunekit.architectures import Stack, find_architecture
from prunekit.architectures.block_lists import config_part
from prunekit.architectures.coverage import base_model_prefix
from prunekit.checkpoint.compressed import KEPT_UNITS_KEY
from prunekit.models.units.base import Factor, Kept, ParameterAxis, UnitGroup
from prunekit.models.units.block_entries import entries_of_kept
from prunekit.models.units.block_kinds import (
    adopt_numbers,
    check_counts_tokens,
    check_same_blocks,
    check_same_rest,
)
from prunekit.models.units.config_entries import entry_name, set_config_entries
from prunekit.models.units.meta_model import meta_model

BlockOutput = Tensor | tuple[Any, ...]
"""Return value of a block: hidden states, in some families with more values after them."""


@dataclass(frozen=True)
class BlockGroup(UnitGroup):
    """The blocks of one stack.

    The factor 0 makes a block pass its input through bit for bit; 1 leaves its output unchanged.

    Attributes:
        name: Full name of the list of blocks.
        stack: Declaration of the stack.
        blocks: The list of blocks.
    """

    stack: Stack
    blocks: nn.ModuleList

    @property
    @override
    def units(self) -> int:
        return len(self.blocks)

    @property
    @override
    def parameter_axes(self) -> tuple[ParameterAxis, ...]:
        # A shared position bias belongs to no block: the first kept block computes it.
        shared = {id(bias.weight) for bias in shared_biases(self).values()}
        return tuple(
            ParameterAxis(parameter, 0, torch.full((len(parameter),), unit))
            for unit, block in enumerate(self.blocks)
            for parameter in block.parameters()
            if id(parameter) not in shared
        )

    @override
    def unit_multiple(self, of: int) -> int:
        return 1  # no width depends on the number of blocks

    @override
    def is_in(self, block: nn.Module) -> bool:
        return block in self.blocks

    @override
    def hook(self, factor: Factor) -> list[RemovableHandle]:
        return [
            block.register_forward_hook(
                partial(_interpolate, unit=unit, factor=factor), with_kwargs=True
            )
            for unit, block in enumerate(self.blocks)
        ]

    @classmethod
    @override
    def stock_entries(
        cls,
        model: PreTrainedModel,
        groups: Sequence[Self],
        kept: Kept,
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for group in groups:
            keep, stack = kept[group.name], group.stack
            entries[entry_name(model.config, stack, stack.depth)] = len(keep)
            own = config_part(model.config.to_dict(), stack.config)
            listed = entries_of_kept(own, stack, keep, group.units)
            entries |= {stack.entry(name): value for name, value in listed.items()}
        whole, fewer = (meta_model(model, each, "blocks") for each in ({}, entries))
        for group in groups:
            shared = {(path, f"{name}.weight") for path, name in shared_biases(group)}
            before, after = (_block_list(each, group.stack) for each in (whole, fewer))
            check_same_blocks(group.name, before, after, kept[group.name], shared)
        check_same_rest(whole, fewer, [group.name for group in groups])
        check_counts_tokens(whole, fewer)
        return entries

    @classmethod
    @override
    def cut(
        cls,
        model: PreTrainedModel,
        groups: Sequence[Self],
        kept: Kept,
        entries: Mapping[str, Any] | None,
    ) -> None:
        whole, fewer = (meta_model(model, each, "blocks") for each in ({}, entries or {}))
        for group in groups:
            keep = kept[group.name]
            before, after = (_block_list(each, group.stack) for each in (whole, fewer))
            _move_shared_biases(group, group.blocks[keep[0]])
            _renumber_record(model, group.name, keep)
            for unit in sorted(set(range(group.units)) - {*keep}, reverse=True):
                del group.blocks[unit]
            for index, block in enumerate(group.blocks):
                adopt_numbers(block, before[keep[index]], after[index])
            # A decoder with cross-attention has its own config object with the same keys.
            own: Any = model.base_model.get_submodule(group.stack.module).config
            part = config_part(model.config, group.stack.config)
            own = own if type(own) is type(part) else part
            setattr(own, own.attribute_map.get("num_hidden_layers", "num_hidden_layers"), len(keep))
        _set_entries(model, entries or {})


def block_groups(model: PreTrainedModel) -> list[BlockGroup]:
    """Return the blocks of each stack, in run order.

    Raises:
        CheckpointError: The family is not declared and cannot be probed.
    """
    base, prefix = model.base_model, base_model_prefix(model)
    return [
        BlockGroup(prefix + stack.blocks, "blocks", stack, base.get_submodule(stack.blocks))  # pyright: ignore
        for stack in find_architecture(model).stacks
    ]


def block_input_output(
    args: tuple[Any, ...], kwargs: dict[str, Any], output: BlockOutput
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
    """Return the input and output hidden states of a block call.

    Args:
        args: Positional arguments of the call; the hidden states come first.
        kwargs: Keyword arguments of the call, with ``hidden_states`` if ``args`` is empty.
        output: Return value of the call.
    """
    x = args[0] if args else kwargs["hidden_states"]
    return x, output if isinstance(output, Tensor) else output[0]


def _block_list(model: PreTrainedModel, stack: Stack) -> nn.ModuleList:
    return cast("nn.ModuleList", model.base_model.get_submodule(stack.blocks))


def _set_entries(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    """Set entries of the model's config, and in a part's copies."""
    nested = {name: value for name, value in entries.items() if "." in name}
    for name in entries.keys() - nested.keys():
        setattr(model.config, name, entries[name])
    set_config_entries(model, nested)


def _interpolate(
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: BlockOutput,
    *,
    unit: int,
    factor: Factor,
) -> BlockOutput:
    """Interpolate from a block's input (factor 0) to its output (1)."""
    x, y = block_input_output(args, kwargs, output)
    # Exact at both ends, unlike x + factor * (y - x).
    mixed = torch.lerp(x, y, factor()[..., unit, None].to(y))
    return mixed if isinstance(output, Tensor) else (mixed, *output[1:])


def shared_biases(group: BlockGroup) -> dict[tuple[str, str], nn.Embedding]:
    """Return the position biases that the first block computes for all blocks.

    Keys are the path of the attention and the name of the embedding in it.
    """
    biases = {}
    for attention in group.stack.attentions:
        if attention.bias is None:
            continue
        module = group.blocks[0].get_submodule(attention.module)
        bias = getattr(module, attention.bias, None)
        if isinstance(bias, nn.Embedding):
            biases[attention.module, attention.bias] = bias
    return biases


def _move_shared_biases(group: BlockGroup, first: nn.Module) -> None:
    """Make ``first`` compute the shared position biases."""
    for (path, name), bias in shared_biases(group).items():
        module: Any = first.get_submodule(path)
        setattr(module, name, bias)
        module.has_relative_attention_bias = True


def _renumber_record(model: PreTrainedModel, name: str, keep: Sequence[int]) -> None:
    """Rename entries of renumbered blocks in the record of kept units."""
    record: dict[str, Any] = getattr(model.config, KEPT_UNITS_KEY, {})
    positions = {unit: index for index, unit in enumerate(keep)}
    pattern = re.compile(rf"{re.escape(name)}\.(\d+)\.(.+)")
    renamed = {}
    for key, value in record.items():
        match = pattern.fullmatch(key)
        if match is None:
            renamed[key] = value
        elif int(match[1]) in positions:
            renamed[f"{name}.{positions[int(match[1])]}.{match[2]}"] = value
    if record:
        setattr(model.config, KEPT_UNITS_KEY, renamed)
