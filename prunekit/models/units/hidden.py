"""Coordinates of the residual stream as units.

Every module that reads the stream sees it through an RMSNorm, so the gates are at the norms. When
d' of d coordinates are kept, with

    w' = w √(d/d')   and   ε' = ε d/d',    x/√(Σx²/d' + ε') w' = x/√(Σx²/d + ε) w,

the smaller model equals the gated one up to rounding. A LayerNorm also subtracts a mean over all d,
which no weights can replace. Norms of queries and keys, where there are any, take their ε from the
same config entry and get ε' too: this changes them by (d/d' − 1) ε/2 over the mean square of their
input. Weights could hide that, but rounding them to bfloat16 costs more.

Shapes: U coordinates, B samples, T tokens.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import lcm, sqrt
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from typing_extensions import override

from prunekit.architectures import Architecture, Stream, find_architecture
from prunekit.architectures.coverage import ADVICE
from prunekit.errors import ShapeError
from prunekit.models.units.base import Factor, Kept, ParameterAxis, UnitGroup
from prunekit.models.units.config_entries import set_config_entries
from prunekit.models.units.coordinates import (
    CoordinateAxis,
    coordinate_axes,
    head_sizes,
    width_key,
    width_step,
)
from prunekit.models.units.meta_model import meta_model
from prunekit.models.units.narrowing import change_values, narrow_parameter
from prunekit.models.units.probed_stream import is_norm, probe_stream


@dataclass(frozen=True)
class HiddenGroup(UnitGroup):
    """The coordinates of the residual stream of all stacks.

    Attributes:
        name: Full name of the input embeddings.
        size: Number of coordinates.
        step: transformers accepts only multiples of this as the width.
        stream: How the family treats the residual stream.
        axes: Parameter axes with the coordinates; tied parameters appear more than once.
        distinct: Those of them without ties; weights that are loaded later are not tied.
        norms: Norms that read the stream.
    """

    size: int
    step: int
    stream: Stream
    axes: tuple[CoordinateAxis, ...] = field(repr=False)
    distinct: tuple[CoordinateAxis, ...] = field(repr=False)
    norms: tuple[nn.Module, ...] = field(repr=False)

    @property
    @override
    def units(self) -> int:
        return self.size

    @property
    @override
    def parameter_axes(self) -> tuple[ParameterAxis, ...]:
        owner = torch.arange(self.size)
        return tuple(ParameterAxis(axis.parameter, axis.axis, owner) for axis in self.distinct)

    def part(self, modules: Collection[nn.Module]) -> Self:
        """Return the same coordinates in some of the modules alone.

        Their gate multiplies the norms among these.
        """
        return replace(
            self,
            axes=tuple(axis for axis in self.axes if axis.module in modules),
            distinct=tuple(axis for axis in self.distinct if axis.module in modules),
            norms=tuple(norm for norm in self.norms if norm in modules),
        )

    @override
    def unit_multiple(self, of: int) -> int:
        return lcm(of, self.step)

    @override
    def is_in(self, block: nn.Module) -> bool:
        return True  # the stream passes every block

    @override
    def hook(self, factor: Factor) -> list[RemovableHandle]:
        scale = partial(_scale, factor=factor)
        return [norm.register_forward_pre_hook(scale) for norm in self.norms]

    @classmethod
    @override
    def stock_entries(
        cls,
        model: PreTrainedModel,
        groups: Sequence[Self],
        kept: Kept,
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        (group,) = groups
        width = len(kept[group.name])
        epsilon = getattr(model.config, group.stream.epsilon)
        entries = {
            width_key(model): width,
            group.stream.epsilon: epsilon * group.size / width,
            **head_sizes(model),
        }
        meta_model(model, {**given, **entries}, "hidden")
        if width % group.step:
            raise ShapeError(
                f"hidden: {width} of {group.size} coordinates would be kept; the width of this "
                f"model has to be a multiple of {group.step}. Keep another number."
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
        (group,) = groups
        entries = entries or {}
        _narrow(group, kept[group.name])
        _rescale(model, group, sqrt(group.size / len(kept[group.name])))
        before, after = head_sizes(model), entries
        _adopt_numbers(model, *(meta_model(model, each, "hidden") for each in (before, after)))
        set_config_entries(model, entries)


def hidden_groups(model: PreTrainedModel) -> list[HiddenGroup]:
    """Return the one group of all coordinates of the residual stream.

    Raises:
        CheckpointError: The family is not declared and cannot be probed.
        ShapeError: Coordinates cannot be removed; the message names the constraint.
    """
    architecture = find_architecture(model)
    if architecture.stream is None and not _can_be_probed(model, architecture):
        raise ShapeError(_reason_not_removable(model))
    size, fixed = model.config.hidden_size, head_sizes(model)
    axes = coordinate_axes(model, fixed)
    stream = architecture.stream or probe_stream(model, architecture, fixed)
    norms = [axis.module for axis in axes if is_norm(axis)]
    names = {module: name for name, module in model.named_modules()}
    name = names[model.get_input_embeddings()]
    distinct = {id(axis.parameter): axis for axis in axes}
    parts = tuple(axes), tuple(distinct.values()), tuple(norms)
    return [HiddenGroup(name, "hidden", size, width_step(model, fixed), stream, *parts)]


def _rescale(model: PreTrainedModel, group: HiddenGroup, root: float) -> None:
    """Multiply the norm weights by ``root`` = √(d/d').

    Embeddings that the model scales by the root of the width are multiplied too. A factor that the
    model applies to the final hidden states by itself is left out of the last norm.
    """
    gains = dict.fromkeys(group.norms, root)
    final, head = _final_norm(model, group), model.get_output_embeddings()
    embeddings = cast("nn.Parameter", model.get_input_embeddings().weight)
    if group.stream.scaled:
        change_values(embeddings, partial(Tensor.mul_, other=root))
        if head is not None and head.weight is embeddings:
            gains[final] /= root
    if head is not None and _divides_logits(model, group.stream):
        gains[final] /= root
    for norm, gain in gains.items():
        amplify = partial(_amplify, gain=gain, offset=group.stream.offset)
        change_values(cast("nn.Parameter", norm.weight), amplify)


def _amplify(weight: Tensor, *, gain: float, offset: float) -> None:
    """Multiply the factors ``weight + offset`` of a norm."""
    weight.copy_((weight.double() + offset) * gain - offset)


def _narrow(group: HiddenGroup, keep: Sequence[int]) -> None:
    """Keep some coordinates of every parameter; ties are preserved."""
    index = torch.tensor([*keep])
    narrowed: dict[nn.Parameter, nn.Parameter] = {}
    for module, name, axis in group.axes:
        whole = cast("nn.Parameter", getattr(module, name))
        if whole not in narrowed:
            narrowed[whole] = narrow_parameter(whole, axis, index)
        setattr(module, name, narrowed[whole])


def _adopt_numbers(model: PreTrainedModel, usual: PreTrainedModel, stock: PreTrainedModel) -> None:
    """Copy numbers and buffers that follow from the new width."""
    paths = {path for path, _ in stock.named_modules()}  # without experts that are linears
    for path, module in model.named_modules():
        if path not in paths:
            continue
        before, after = vars(usual.get_submodule(path)), vars(stock.get_submodule(path))
        for key, value in after.items():
            if isinstance(value, int | float) and value != before[key]:
                setattr(module, key, value)
        for key, buffer in after["_buffers"].items():
            old = before["_buffers"][key]
            if buffer is not None and not torch.equal(buffer, old):
                mine = module._buffers[key]
                assert mine is not None
                module._buffers[key] = buffer.to(mine)


def _final_norm(model: PreTrainedModel, group: HiddenGroup) -> nn.Module:
    """Return the norm between the last block and the output embeddings."""
    stacks = find_architecture(model).stacks
    blocks = [model.base_model.get_submodule(stack.blocks) for stack in stacks]
    inside = {module for each in blocks for module in each.modules()}
    return [norm for norm in group.norms if norm not in inside][-1]


def _divides_logits(model: PreTrainedModel, stream: Stream) -> bool:
    """Return whether the model divides the stream before the logits."""
    values = [getattr(model.config, name) for name in stream.divided if hasattr(model.config, name)]
    return bool(values and values[0])


def _can_be_probed(model: PreTrainedModel, architecture: Architecture) -> bool:
    """Return whether one entry is the width of one stack."""
    single = len(architecture.stacks) == 1 and hasattr(model.config, "hidden_size")
    return single and not _has_layer_norm(model)


def _has_layer_norm(model: PreTrainedModel) -> bool:
    """Return whether a LayerNorm is as wide as the stream."""
    width = getattr(model.config, "hidden_size", None)
    norms = (module for module in model.modules() if isinstance(module, nn.LayerNorm))
    return any(norm.normalized_shape == (width,) for norm in norms)


def _reason_not_removable(model: PreTrainedModel) -> str:
    """Return why coordinates of this family cannot be removed."""
    kind = model.config.model_type
    if not _has_layer_norm(model):
        return f"hidden: nothing says what models of type {kind!r} do with their width. {ADVICE}"
    reason = (
        f"hidden: models of type {kind!r} normalise with LayerNorm, whose mean over fewer "
        "coordinates is another, so that no smaller model answers as the gated one."
    )
    stacks = find_architecture(model).stacks
    if not any(attention.entries for stack in stacks for attention in stack.attentions):
        reason += (
            " Nor can their config say it: the size of a head is the hidden size divided by the "
            "number of heads."
        )
    return f"{reason} Take out heads, neurons or blocks instead."


def _scale(_: nn.Module, inputs: tuple[Tensor, ...], *, factor: Factor) -> tuple[Tensor]:
    (x,) = inputs
    return (x * factor().to(x),)
