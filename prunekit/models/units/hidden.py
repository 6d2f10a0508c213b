"""Coordinates of the residual stream as units: gated, counted, and taken out of every matrix.

What every reader of the stream sees goes through an RMSNorm first, and that is where gates are. Of
d coordinates d' stay; with

    w' = w √(d/d')   and   ε' = ε d/d',    x/√(Σx²/d' + ε') w' = x/√(Σx²/d + ε) w,

so that the smaller model is the gated one, but for rounding. A LayerNorm also subtracts a mean over
all d, which no weights make up for. Norms of queries and keys, where there are any, take their ε
from the same entry of the config and get ε' too: it changes them by (d/d' − 1) ε/2 over the mean
square of what they read. Weights could hide that, but their rounding to bfloat16 costs more.

Shapes: U coordinates, B samples, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm, sqrt
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from typing_extensions import override

from prunekit.architectures import Stream, find
from prunekit.architectures.coverage import ADVICE, LINEAR
from prunekit.errors import ShapeError
from prunekit.models.units.base import Factor, ParameterAxis, UnitGroup
from prunekit.models.units.meta_model import meta_model


class Axis(NamedTuple):
    """The axis of a parameter along which the coordinates lie."""

    module: nn.Module
    name: str
    axis: int

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now."""
        return cast("nn.Parameter", getattr(self.module, self.name))


@dataclass(frozen=True)
class Width(UnitGroup):
    """The coordinates of the residual stream; all stacks of a model share them.

    Attributes:
        name: Full name of the embeddings, which are the first to write it.
        size: How many there are.
        step: transformers takes only multiples of this.
        stream: What the family does with them.
        axes: Where they lie in parameters; tied ones are there more than once.
        norms: What reads them first.
    """

    size: int
    step: int
    stream: Stream
    axes: tuple[Axis, ...] = field(repr=False)
    norms: tuple[nn.Module, ...] = field(repr=False)

    @property
    @override
    def units(self) -> int:
        return self.size

    @property
    @override
    def shares(self) -> tuple[ParameterAxis, ...]:
        owner = torch.arange(self.size)
        each = {id(axis.parameter): axis for axis in self.axes}
        return tuple(ParameterAxis(axis.parameter, axis.axis, owner) for axis in each.values())

    @override
    def multiple(self, of: int) -> int:
        return lcm(of, self.step)

    @override
    def hook(self, factor: Factor) -> list[RemovableHandle]:
        def scale(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            (x,) = inputs
            return (x * factor().to(x.dtype),)

        return [norm.register_forward_pre_hook(scale) for norm in self.norms]


def widths(model: PreTrainedModel) -> list[Width]:
    """Return the one place where the coordinates of the residual stream are.

    Raises:
        CheckpointError: The family is not declared and cannot be probed.
        ShapeError: They cannot be taken out; the message names the constraint.
    """
    stream = find(model).stream
    if stream is None:
        raise ShapeError(_why_not(model))
    size, axes = model.config.hidden_size, coordinates(model)
    norms = [
        module
        for module, name, _ in axes
        if name == "weight" and not isinstance(module, (*LINEAR, nn.Embedding))
    ]
    names = {module: name for name, module in model.named_modules()}
    where = names[model.get_input_embeddings()]
    return [Width(where, "hidden", size, _step(model), stream, tuple(axes), tuple(norms))]


def coordinates(model: PreTrainedModel) -> list[Axis]:
    """Return every axis along which the coordinates lie: it grows with the width in the config.

    Raises:
        ShapeError: More than they grows with it.
    """
    size: int = model.config.hidden_size
    usual = meta_model(model, _sizes(model), "hidden")
    wider = meta_model(model, {_entry(model): 2 * size, **_sizes(model)}, "hidden")
    return [
        Axis(module, name, axis)
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
        for axis in _grown(f"{path}.{name}".lstrip("."), size, usual, wider)
    ]


def width_entries(
    model: PreTrainedModel, place: Width, kept: Sequence[int], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what ``config.json`` has to say of a model that keeps these coordinates.

    ``given``: what else it says by then.

    Raises:
        ShapeError: A stock config cannot say it; the message names the constraint.
    """
    epsilon = getattr(model.config, place.stream.epsilon)
    entries = {
        _entry(model): len(kept),
        place.stream.epsilon: epsilon * place.size / len(kept),
        **_sizes(model),
    }
    meta_model(model, {**given, **entries}, "hidden")
    return entries


@torch.no_grad()
def remove_hidden(
    model: PreTrainedModel, place: Width, kept: Sequence[int], entries: Mapping[str, Any]
) -> None:
    """Remove the other coordinates and let the config say so, in place."""
    root = sqrt(place.size / len(kept))
    gains = dict.fromkeys(place.norms, root)
    final, head = _last_norm(model, place), model.get_output_embeddings()
    embeddings = cast("nn.Parameter", model.get_input_embeddings().weight)
    if place.stream.scaled:
        embeddings *= root
        if head is not None and head.weight is embeddings:
            gains[final] /= root
    if head is not None and _divides(model, place.stream):
        gains[final] /= root
    for norm, gain in gains.items():
        weight, offset = cast("Tensor", norm.weight), place.stream.offset
        weight.copy_((weight.double() + offset) * gain - offset)
    _cut(place, kept)
    _adopt(model, meta_model(model, _sizes(model), "hidden"), meta_model(model, entries, "hidden"))


def _cut(place: Width, kept: Sequence[int]) -> None:
    index, cut = torch.tensor([*kept]), {}
    for module, name, axis in place.axes:
        whole = cast("nn.Parameter", getattr(module, name))
        if id(whole) not in cut:
            part = whole.detach().index_select(axis, index.to(whole.device))
            # What was cut is held, so that nothing else can have its identity.
            cut[id(whole)] = whole, nn.Parameter(part, requires_grad=whole.requires_grad)
        setattr(module, name, cut[id(whole)][1])


def _adopt(model: PreTrainedModel, usual: PreTrainedModel, other: PreTrainedModel) -> None:
    """Take over every number and buffer in which a stock model of the new width differs."""
    for path, module in model.named_modules():
        before, after = vars(usual.get_submodule(path)), vars(other.get_submodule(path))
        for key, value in after.items():
            if isinstance(value, int | float) and value != before[key]:
                setattr(module, key, value)
        for key, buffer in after["_buffers"].items():
            old = before["_buffers"][key]
            if buffer is not None and not torch.equal(buffer, old):
                mine = module._buffers[key]
                assert mine is not None
                module._buffers[key] = buffer.to(mine)


def _entry(model: PreTrainedModel) -> str:
    return model.config.attribute_map.get("hidden_size", "hidden_size")


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    """Return the entries that say the size of a head, which may have followed from the width."""
    return {
        name: getattr(block.get_submodule(attention.module), attention.size)
        for stack in find(model).stacks
        for block in [model.base_model.get_submodule(stack.blocks)[0]]  # pyright: ignore
        for attention in stack.attentions
        for name, count in attention.entries
        if count == "size"
    }


def _step(model: PreTrainedModel) -> int:
    """Return what the width has to be a multiple of: in some families, the number of heads."""
    try:
        meta_model(model, {_entry(model): model.config.hidden_size + 1, **_sizes(model)}, "hidden")
    except ShapeError:
        return model.config.num_attention_heads
    return 1


def _grown(path: str, size: int, usual: PreTrainedModel, wider: PreTrainedModel) -> list[int]:
    """Return the axis, if any, of a parameter that grows with the width of the stream.

    Raises:
        ShapeError: More than the stream grows with it.
    """
    before, after = usual.get_parameter(path).shape, wider.get_parameter(path).shape
    axes = [axis for axis, width in enumerate(before) if after[axis] != width]
    if len(axes) > 1 or any((before[axis], after[axis]) != (size, 2 * size) for axis in axes):
        raise ShapeError(
            f"{path}: a config of another width makes {list(after)} of {list(before)}, which is "
            "more than the coordinates of the residual stream. They cannot be taken out."
        )
    return axes


def _last_norm(model: PreTrainedModel, place: Width) -> nn.Module:
    """Return the norm between the last block and the head."""
    blocks = [model.base_model.get_submodule(stack.blocks) for stack in find(model).stacks]
    inside = {module for each in blocks for module in each.modules()}
    return [norm for norm in place.norms if norm not in inside][-1]


def _divides(model: PreTrainedModel, stream: Stream) -> bool:
    said = [getattr(model.config, name) for name in stream.divided if hasattr(model.config, name)]
    return bool(said and said[0])


def _why_not(model: PreTrainedModel) -> str:
    kind = model.config.model_type
    if not any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        return f"hidden: nothing says what models of type {kind!r} do with their width. {ADVICE}"
    reason = (
        f"hidden: models of type {kind!r} normalise with LayerNorm, whose mean over fewer "
        "coordinates is another, so that no smaller model answers as the gated one."
    )
    if not any(attention.entries for stack in find(model).stacks for attention in stack.attentions):
        reason += (
            " Nor can their config say it: the size of a head is the hidden size divided by the "
            "number of heads."
        )
    return f"{reason} Take out heads, neurons or blocks instead."
