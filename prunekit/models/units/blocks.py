"""Whole blocks of a stack as units: gated, counted, and taken out.

Shapes: U blocks, B samples, T tokens, D features of the hidden state.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from typing_extensions import override

from prunekit.architectures import Stack, find
from prunekit.architectures.coverage import prefix
from prunekit.checkpoint.compressed import RECORD
from prunekit.errors import ShapeError
from prunekit.models.units.base import Factor, ParameterAxis, UnitGroup
from prunekit.models.units.meta_model import meta_model

Output = Tensor | tuple[Any, ...]
"""What a block answers: a hidden state, in some families with something beside it."""

Kept = Mapping[str, Sequence[int]]
"""The blocks that each stack keeps, by its name, in ascending order."""


@dataclass(frozen=True)
class Depth(UnitGroup):
    """The blocks of one stack.

    A block with the factor 0 gives on what it reads, bit for bit, and with 1 what it makes of it.

    Attributes:
        name: Full name of the list of blocks.
        stack: Where it is declared.
        blocks: The list.
    """

    stack: Stack
    blocks: nn.ModuleList

    @property
    @override
    def units(self) -> int:
        return len(self.blocks)

    @property
    @override
    def shares(self) -> tuple[ParameterAxis, ...]:
        # The position bias goes to the next block if the first one goes.
        stays = {id(bias.weight) for bias in _biases(self).values()}
        return tuple(
            ParameterAxis(parameter, 0, torch.full((len(parameter),), unit))
            for unit, block in enumerate(self.blocks)
            for parameter in block.parameters()
            if id(parameter) not in stays
        )

    @override
    def multiple(self, of: int) -> int:
        return 1  # of blocks no width is made up

    @override
    def hook(self, factor: Factor) -> list[RemovableHandle]:
        return [
            block.register_forward_hook(_mixing(unit, factor), with_kwargs=True)
            for unit, block in enumerate(self.blocks)
        ]


def depths(model: PreTrainedModel) -> list[Depth]:
    """Return the blocks of each stack, in run order.

    Raises:
        CheckpointError: The family is not declared and cannot be probed.
    """
    base, before = model.base_model, prefix(model)
    return [
        Depth(before + stack.blocks, "blocks", stack, base.get_submodule(stack.blocks))  # pyright: ignore
        for stack in find(model).stacks
    ]


def depth_entries(
    model: PreTrainedModel, found: Sequence[Depth], kept: Kept
) -> dict[str, int | list[Any]]:
    """Return what ``config.json`` has to say of a model whose stacks keep these blocks.

    Raises:
        ShapeError: A stock config cannot say it; the message names the constraint.
    """
    entries: dict[str, int | list[Any]] = {}
    for place in found:
        entries[_entry(model, place.stack.depth)] = len(kept[place.name])
        for name in place.stack.per_block:
            each = getattr(model.config, name, None)
            if isinstance(each, list):
                entries[name] = [each[unit] for unit in kept[place.name]]
    other = meta_model(model, entries, "blocks")
    for place, trial in zip(found, depths(other), strict=True):
        if trial.units != len(kept[place.name]):
            raise ShapeError(
                f"{place.name}: a config of type {model.config.model_type!r} makes {trial.units} "
                f"blocks of it, not {len(kept[place.name])}."
            )
        shared = {f"{path}.{name}.weight" for path, name in _biases(place)}
        for unit, block in zip(kept[place.name], trial.blocks, strict=True):
            _check_alike(f"{place.name}.{unit}", place.blocks[unit], block, shared)
    return entries


def remove_blocks(
    model: PreTrainedModel, found: Sequence[Depth], kept: Kept, entries: Mapping[str, Any]
) -> None:
    """Remove the other blocks, number those that stay, and let the config say so, in place."""
    for place in found:
        keep = kept[place.name]
        _hand_on(place, place.blocks[keep[0]])
        _renumber(model, place, keep)
        for unit in sorted(set(range(place.units)) - {*keep}, reverse=True):
            del place.blocks[unit]
        for index, block in enumerate(place.blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index  # pyright: ignore
        # A decoder that reads an encoder has a config of its own, of the same entries.
        own = model.base_model.get_submodule(place.stack.module).config
        setattr(own, _entry(model, "num_hidden_layers"), len(keep))
    for name, value in entries.items():
        setattr(model.config, name, value)


def _entry(model: PreTrainedModel, name: str) -> str:
    """Return how a family writes an entry that all have."""
    return model.config.attribute_map.get(name, name)


def _mixing(unit: int, factor: Factor) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output) -> Output:
        read, gave = passage(args, kwargs, output)
        # Exact at both ends, unlike read + weight * (gave - read).
        mixed = torch.lerp(read, gave, factor()[..., unit, None].to(gave))
        return mixed if isinstance(output, Tensor) else (mixed, *output[1:])

    return hook


def passage(
    args: tuple[Any, ...], kwargs: dict[str, Any], output: Output
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
    """Return the hidden states that a call of a block reads and gives."""
    read = args[0] if args else kwargs["hidden_states"]
    return read, output if isinstance(output, Tensor) else output[0]


def _check_alike(name: str, block: nn.Module, other: nn.Module, shared: set[str]) -> None:
    """Refuse a stock block at a new place that computes something else than ours did.

    ``shared``: what the first block has for all.
    """
    names = (dict(each.named_parameters()).keys() - shared for each in (block, other))
    if differ := set.symmetric_difference(*map(set, names)):
        raise ShapeError(
            f"{name}.{min(differ)}: not every block has it, and in its new place a stock model "
            "wants the other kind. Blocks of this model cannot be taken out."
        )
    modules = dict(other.named_modules())
    for path, mine in block.named_modules():
        stocks = vars(modules[path]) if path in modules else {}
        for key, value in vars(mine).items():
            stock = stocks.get(key, value)
            if isinstance(value, float | str) and value != stock:
                raise ShapeError(
                    f"{name}.{path}: {key} is {value}, and a stock model with fewer blocks gives "
                    f"the block {stock} in its new place. Blocks of this model cannot be taken out."
                )


def _biases(place: Depth) -> dict[tuple[str, str], nn.Embedding]:
    """Return the position biases that the first block makes for all, by attention and name."""
    found = {}
    for attention in place.stack.attentions:
        module = place.blocks[0].get_submodule(attention.module)
        bias = getattr(module, attention.bias or "", None)
        if isinstance(bias, nn.Embedding):
            found[attention.module, attention.bias] = bias
    return found


def _hand_on(place: Depth, first: nn.Module) -> None:
    """Let ``first`` make the position bias, if that was what an earlier block did."""
    for (path, name), bias in _biases(place).items():
        module: Any = first.get_submodule(path)
        setattr(module, name, bias)
        module.has_relative_attention_bias = True


def _renumber(model: PreTrainedModel, place: Depth, keep: Sequence[int]) -> None:
    """Let what the config records of single blocks follow them to their new places."""
    said: dict[str, Any] = getattr(model.config, RECORD, {})
    places = {unit: index for index, unit in enumerate(keep)}
    pattern = re.compile(rf"{re.escape(place.name)}\.(\d+)\.(.+)")
    moved = {}
    for name, value in said.items():
        found = pattern.fullmatch(name)
        if found is None:
            moved[name] = value
        elif int(found[1]) in places:
            moved[f"{place.name}.{places[int(found[1])]}.{found[2]}"] = value
    if said:
        setattr(model.config, RECORD, moved)
