"""Whole experts as units.

A closed expert gets no token: the router chooses among the open ones, as in the model without it.
All layers keep equally many, which a stock config can say. Experts that every token takes ("shared
experts") are no units.

Shapes: U experts, R rows of a tensor along an axis.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from typing_extensions import override

from prunekit.architectures import Stack, find_architecture
from prunekit.architectures.coverage import base_model_prefix
from prunekit.architectures.expert_layout import ExpertLayout, expert_layout, is_fused, is_list
from prunekit.errors import CheckpointError, ShapeError
from prunekit.models.experts import Expert
from prunekit.models.units.base import Factor, Kept, ParameterAxis, UnitGroup
from prunekit.models.units.expert_axes import ExpertCount, expert_count, tensors
from prunekit.models.units.expert_gate import ExpertGate
from prunekit.models.units.meta_model import format_entries, meta_model
from prunekit.models.units.narrowing import narrow_buffer, narrow_parameter
from prunekit.models.units.routers import Router, find_router


@dataclass(frozen=True)
class ExpertGroup(UnitGroup):
    """The experts of one layer.

    Attributes:
        name: Full name of the module of the experts.
        stack: The stack of the block.
        block: The block.
        module: The module of the experts.
        router: Their router.
        count: Where the model states the number of experts.
    """

    stack: Stack
    block: nn.Module = field(repr=False)
    module: nn.Module = field(repr=False)
    router: Router = field(repr=False)
    count: ExpertCount = field(repr=False)

    @property
    @override
    def units(self) -> int:
        return self.count.count

    @property
    @override
    def anchor(self) -> object:
        return self.module

    @property
    @override
    def parameter_axes(self) -> tuple[ParameterAxis, ...]:
        axes = [
            ParameterAxis(cast("nn.Parameter", axis.tensor), axis.axis, self._owner(self.units))
            for axis in self.router.axes
            if axis.is_parameter
        ]
        for number, expert in _expert_modules(self.module).items():
            for parameter in expert.parameters():
                owner = torch.full((len(parameter),), number)
                axes.append(ParameterAxis(parameter, 0, owner))
        for _, _, parameter in _fused_tensors(self.module):
            axes.append(ParameterAxis(parameter, 0, self._owner(len(parameter))))
        return tuple(axes)

    @override
    def unit_multiple(self, of: int) -> int:
        return self.router.groups  # no width depends on the number of experts

    @override
    def is_in(self, block: nn.Module) -> bool:
        return self.block is block

    @override
    def hook(self, factor: Factor) -> list[RemovableHandle]:
        return ExpertGate(self.name, factor, self.router).attach(self.module)

    @override
    def check_left(self, units: int) -> None:
        self.router.check_left(self.name, units)

    @override
    def comparable(
        self, scores: Float[Tensor, " U"], keep: Bool[Tensor, " U"]
    ) -> Float[Tensor, " U"]:
        return self.router.balanced(scores, keep)

    @classmethod
    @override
    def stock_entries(
        cls,
        model: PreTrainedModel,
        groups: Sequence[Self],
        kept: Kept,
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        first, counts = groups[0], {len(kept[group.name]) for group in groups}
        if len(counts) > 1:
            raise ShapeError(
                f"experts: layers keep from {min(counts)} to {max(counts)}, and a config of type "
                f'{model.config.model_type!r} has one number for all. Choose scope = "layer".'
            )
        left = counts.pop()
        first.check_left(left)
        entries = first.count.entries(model.config, left)
        stock = meta_model(model, {**given, **entries}, "experts")
        usual = meta_model(model, {**given}, "experts")
        for name, axis in first.count.axes.items():
            before, after = ([*tensors(each)[name].shape] for each in (usual, stock))
            if after != [*before[:axis], left, *before[axis + 1 :]]:
                raise ShapeError(
                    f"{name}: with {format_entries(entries)} a stock model has {after} of {before}."
                )
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
        for group in groups:
            group.narrow(kept[group.name])
        groups[0].count.apply(model, len(kept[groups[0].name]))

    def narrow(self, keep: Sequence[int]) -> None:
        """Remove all other experts, which invalidates the group."""
        for axis in self.router.axes:
            narrow = narrow_parameter if axis.is_parameter else narrow_buffer
            axis.set(narrow(cast("Any", axis.tensor), axis.axis, torch.tensor([*keep])))
        for owner, name, parameter in [*_fused_tensors(self.module)]:
            rows = torch.isin(self._owner(len(parameter)), torch.tensor([*keep]))
            setattr(owner, name, narrow_parameter(parameter, 0, rows.nonzero().flatten()))
        experts = _expert_modules(self.module)
        for number in experts:
            del self.module._modules[str(number)]
        for place, number in enumerate(keep if experts else ()):
            self.module.add_module(str(place), experts[number])

    def _owner(self, rows: int) -> Int[Tensor, " R"]:
        """Return the expert of each row, where all have equally many."""
        return torch.arange(self.units).repeat_interleave(rows // self.units)


def expert_groups(model: PreTrainedModel) -> list[ExpertGroup]:
    """Return the experts of each layer, in run order.

    Raises:
        CheckpointError: The family is not declared and cannot be probed, or has no experts.
        ShapeError: Experts cannot be removed; the message names the constraint.
    """
    places = [*_places(model)]
    if not places:
        raise CheckpointError(f"{type(model).__name__}: its blocks have no experts.")
    for place in places:
        _check_layout(place.name, place.module)
    counts = {_layout(place.module).count(place.module) for place in places}
    if len(counts) > 1:
        raise ShapeError(f"experts: layers have from {min(counts)} to {max(counts)} of them.")
    count = expert_count(model, [place.name for place in places], counts.pop())
    groups = []
    for name, stack, block_name, block, module in places:
        router = find_router(model, block_name, name, count)
        groups.append(ExpertGroup(name, "experts", stack, block, module, router, count))
    return groups


class _Place(NamedTuple):
    """A module of experts and where it is."""

    name: str
    stack: Stack
    block_name: str
    block: nn.Module
    module: nn.Module


def _places(model: PreTrainedModel) -> Iterator[_Place]:
    """Yield the modules of experts in the blocks."""
    base, prefix = model.base_model, base_model_prefix(model)
    for stack in find_architecture(model).stacks:
        for number, block in base.get_submodule(stack.blocks).named_children():
            name = f"{prefix}{stack.blocks}.{number}"
            for path, module in block.named_modules():
                if is_list(module) or is_fused(module) or _expert_modules(module):
                    yield _Place(f"{name}.{path}", stack, name, block, module)


def _check_layout(name: str, module: nn.Module) -> None:
    """Refuse experts that cannot be closed one by one.

    Raises:
        ShapeError: They get no numbers of experts.
    """
    if is_list(module) or _layout(module).call == "grouped":
        raise ShapeError(
            f"{name}: {type(module).__name__} is called with the tokens of all experts, not with "
            "numbers of experts, so single ones cannot be closed. Their weights can be pruned."
        )


def _layout(module: nn.Module) -> ExpertLayout:
    layout = expert_layout(module)
    assert layout is not None
    return layout


def _expert_modules(module: nn.Module) -> dict[int, nn.Module]:
    """Return experts that are linears now, by number."""
    return {
        int(name): child for name, child in module.named_children() if isinstance(child, Expert)
    }


def _fused_tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield owner, name and value of each tensor of all experts."""
    for path in _layout(module).tensors if is_fused(module) else ():
        where, _, name = path.rpartition(".")
        owner = module.get_submodule(where)
        yield owner, name, getattr(owner, name)
