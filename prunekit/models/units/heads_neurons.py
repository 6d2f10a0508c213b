"""Attention heads and feed-forward neurons as units.

Both are rows of the linears that write them and columns of the one linear that reads them. Under
grouped queries a unit is a key head with the query heads that share it. Low-rank adapters of these
linears belong to the units likewise: rows of B where they are written, columns of A where read.

Shapes: U units, P parts of a unit (the query heads of a group), R rows or columns of a part, I
inputs of the reader.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from typing_extensions import override

from prunekit.architectures import Attention, FeedForward, Stack, find_architecture
from prunekit.architectures.adapters import base_layer
from prunekit.architectures.coverage import ADVICE, base_model_prefix, has_module
from prunekit.errors import CheckpointError, ConfigError, ShapeError
from prunekit.models.adapters import check_low_rank, input_parts, output_parts
from prunekit.models.attention_hook import check_observable
from prunekit.models.orientation import stored_axis, weight_matrix
from prunekit.models.units import linear_config
from prunekit.models.units.base import Factor, Kept, ParameterAxis, UnitGroup
from prunekit.models.units.config_entries import set_config_entries
from prunekit.models.units.emptied import emptied, empty, is_empty
from prunekit.models.units.kept_record import update_record
from prunekit.models.units.kinds import Kind
from prunekit.models.units.meta_model import format_entries, meta_model
from prunekit.models.units.position_bias import (
    bias_columns,
    narrow_bias,
    select_bias_columns,
    select_position_biases,
)
from prunekit.models.units.unit_index import (
    UnitIndex,
    head_index,
    keep_units,
    neuron_index,
    output_owner,
    owner_of,
)


@dataclass(frozen=True)
class LinearUnitGroup(UnitGroup):
    """The heads of one attention, or the neurons of one feed-forward.

    Attributes:
        name: Full name of the attention, or of the linear that reads the neurons.
        kind: Kind of the units.
        stack: The stack of the block.
        block: The block.
        module: The attention, or the linear that reads the neurons.
        declared: Declaration of the attention or feed-forward.
        writers: Outputs of the linears that compute the units.
        reader: Inputs of the one linear that reads the units.
    """

    stack: Stack
    block: nn.Module
    module: nn.Module
    declared: Attention | FeedForward
    writers: tuple[UnitIndex, ...]
    reader: UnitIndex

    @property
    @override
    def units(self) -> int:
        return len(self.reader.index)

    @property
    def features_per_unit(self) -> int:
        """Number of reader inputs that belong to one unit."""
        return self.reader.index[0].numel()

    @property
    def owner(self) -> Int[Tensor, " I"]:
        """The unit that each input of the reader belongs to."""
        return owner_of([self.reader.index])

    @property
    @override
    def anchor(self) -> object:
        return base_layer(self.module)  # the same with and without adapters

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        """The linears that write and read the units, each once."""
        return tuple(dict.fromkeys(part.linear for part in (*self.writers, self.reader)))

    @property
    def bias_attention(self) -> Attention | None:
        """Declaration of an attention with a shared position bias."""
        shares = isinstance(self.declared, Attention) and self.declared.bias is not None
        return cast("Attention", self.declared) if shares else None

    @property
    def has_bias_columns(self) -> bool:
        """Whether the shared position bias has a column per head."""
        return self.bias_attention is not None and bool(self.bias_attention.bias)

    @property
    @override
    def parameter_axes(self) -> tuple[ParameterAxis, ...]:
        axes = [
            ParameterAxis(_weight(part), stored_axis(part, 1), self.owner)
            for part in input_parts(self.reader.linear)
        ]
        for linear in dict.fromkeys(part.linear for part in self.writers):
            owner = output_owner(linear, self.writers)
            for part in output_parts(linear):
                axes.append(ParameterAxis(_weight(part), stored_axis(part, 0), owner))
                if part.bias is not None:
                    axes.append(ParameterAxis(cast("nn.Parameter", part.bias), 0, owner))
        return tuple(axes)

    @override
    def is_in(self, block: nn.Module) -> bool:
        return self.block is block

    @override
    def hook(self, factor: Factor) -> list[RemovableHandle]:
        scale = partial(_scale, factor=factor, owner=self.owner.to(factor().device))
        return [self.reader.linear.register_forward_pre_hook(scale)]

    @override
    def fewest(self, least: int) -> int:
        if not least and isinstance(self.declared, Attention) and not self.declared.emptiable:
            raise ConfigError(
                f"least: 0 would take whole attentions out, and nothing says how "
                f"{type(self.module).__name__} ({self.name}) returns its output. Use least = 1, or "
                "declare the family."
            )
        return least

    @override
    def check_unequal(self) -> None:
        if self.bias_attention:
            check_observable([self.module])

    @classmethod
    @override
    def stock_entries(
        cls,
        model: PreTrainedModel,
        groups: Sequence[Self],
        kept: Kept,
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        kind, family = groups[0].kind, model.config.model_type
        linear_config.check_none_empty(emptied(model, kind), kind, family)
        linear_config.check_same_bias_heads(groups, kept, family)
        entries: dict[str, Any] = {}
        for alike in linear_config.by_entry(groups):
            units = linear_config.common_count(alike, kept, family)
            entries |= linear_config.config_entries(alike[0], units, family)
        changed = {**given, **entries}
        try:
            fewer = meta_model(model, changed, kind)
            stock = linear_groups(fewer, kind)
        except CheckpointError as error:  # of a probed family, which has to run for it
            raise ShapeError(
                f"{kind}: a model of type {family!r} with {format_entries(changed)} does not run."
            ) from error
        linear_config.check_same_shape(groups, stock, kept, changed)
        linear_config.check_same_rest(meta_model(model, given, kind), fewer, groups, changed)
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
        record = {
            group.name: bias_columns(group.module, keep) if group.has_bias_columns else len(keep)
            for group in groups
            for keep in [kept[group.name]]
        }
        for group in groups:
            group.narrow(kept[group.name])
        if entries is None:
            select_position_biases(model, groups)
        else:
            record = {}
            for group in groups:
                if group.bias_attention:
                    narrow_bias(group.module, group.bias_attention)
            set_config_entries(model, entries)
        update_record(model, [*kept], record)

    @torch.no_grad()
    def scale(self, factors: Float[Tensor, " U"]) -> None:
        """Multiply the weights that read the units by their factors, in place."""
        for part in input_parts(self.reader.linear):
            weight = weight_matrix(part)
            weight *= factors.to(weight)[self.owner.to(weight.device)]

    def narrow(self, keep: Sequence[int]) -> None:
        """Remove all other units from the weights, which invalidates the group."""
        if keep:
            keep_units(self.writers, self.reader, keep)
        else:
            empty(self.block, self.declared)
        if isinstance(self.declared, Attention):
            linear_config.set_head_counts(self, self.declared, len(keep))
        if self.bias_attention:
            select_bias_columns(self.module, self.bias_attention, keep)


def linear_groups(model: PreTrainedModel, kind: Kind) -> list[LinearUnitGroup]:
    """Return the groups of heads or neurons, in run order.

    Raises:
        CheckpointError: The family is not declared, or without its heads and neurons.
        ConfigError: A linear has an adapter that is no product of two matrices.
    """
    groups = declared_linear_groups(model, kind)
    if not groups and emptied(model, kind):
        raise CheckpointError(
            f"{type(model).__name__}: all of its {kind} are removed, so none is left to remove."
        )
    if not groups:
        raise CheckpointError(
            f"{type(model).__name__}: nothing says where models of type "
            f"{model.config.model_type!r} keep their {kind}, so none can be removed. {ADVICE}"
        )
    return groups


def declared_linear_groups(model: PreTrainedModel, kind: Kind) -> list[LinearUnitGroup]:
    """Return the declared groups of heads or neurons, if any."""
    of_block = head_groups if kind == "heads" else neuron_groups
    groups = [
        group
        for stack in find_architecture(model).stacks
        for name, block in model.base_model.get_submodule(stack.blocks).named_children()
        for group in of_block(f"{base_model_prefix(model)}{stack.blocks}.{name}.", block, stack)
    ]
    for group in groups:
        for linear in group.linears:
            check_low_rank(linear, group.name)
    return groups


def head_groups(name: str, block: nn.Module, stack: Stack) -> Iterator[LinearUnitGroup]:
    """Yield a block's groups of heads that have any.

    Args:
        name: Prefix of their names.
        block: The block.
        stack: Its stack.
    """
    for declared in stack.attentions:
        if has_module(block, declared.output) and not is_empty(block, declared):
            module = block.get_submodule(declared.module)
            index = head_index(block, declared)
            full_name = f"{name}{declared.module}"
            yield LinearUnitGroup(full_name, "heads", stack, block, module, declared, *index)


def neuron_groups(name: str, block: nn.Module, stack: Stack) -> Iterator[LinearUnitGroup]:
    """Yield a block's groups of neurons that have any.

    Args:
        name: Prefix of their names.
        block: The block.
        stack: Its stack.
    """
    for declared in stack.feed_forwards:
        if has_module(block, declared.output) and not is_empty(block, declared):
            reader = block.get_submodule(declared.output)
            index = neuron_index(block, declared)
            full_name = f"{name}{declared.output}"
            yield LinearUnitGroup(full_name, "neurons", stack, block, reader, declared, *index)


def _weight(linear: nn.Module) -> nn.Parameter:
    return cast("nn.Parameter", linear.weight)


def _scale(_: nn.Module, inputs: tuple[Tensor], *, factor: Factor, owner: Tensor) -> tuple[Tensor]:
    (x,) = inputs
    factors = factor()[..., owner].to(x)  # the model may have moved to another device
    if factors.ndim > x.ndim:  # one per sample, where batch and tokens are one axis
        tokens = len(x) // len(factors)
        factors = factors.flatten(0, 1).repeat_interleave(tokens, 0)
    return (x * factors,)
