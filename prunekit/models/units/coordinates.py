"""Axes of parameters along which the coordinates of the residual stream lie.

They are those that grow with the width in the config.
"""

from collections.abc import Mapping
from math import lcm
from typing import NamedTuple, cast

from torch import nn
from transformers import PreTrainedModel

from prunekit.architectures import Attention, find_architecture
from prunekit.architectures.coverage import has_module
from prunekit.architectures.expert_layout import fused_experts
from prunekit.errors import ShapeError
from prunekit.models.experts import Expert, unfuse
from prunekit.models.units.meta_model import meta_model

HEAD_SIZE = "head_dim"
"""Entry of ``config.json`` in most families for the size of a head."""

GROUPED = 8
"""Grouped products of experts read rows of a multiple of 16 bytes: 8 numbers of two bytes."""


class CoordinateAxis(NamedTuple):
    """Axis of a parameter along which the coordinates lie."""

    module: nn.Module
    name: str
    axis: int

    @property
    def parameter(self) -> nn.Parameter:
        """The current parameter."""
        return cast("nn.Parameter", getattr(self.module, self.name))


def coordinate_axes(
    model: PreTrainedModel, fixed: Mapping[str, int] | None = None
) -> list[CoordinateAxis]:
    """Return every parameter axis that grows with the width in the config.

    Args:
        model: The model.
        fixed: Its :func:`head_sizes`, where known: undeclared families are traced for them.

    Raises:
        ShapeError: An axis other than the coordinates grows too.
    """
    size: int = model.config.hidden_size
    fixed = head_sizes(model) if fixed is None else fixed
    usual = meta_model(model, fixed, "hidden")
    wider = meta_model(model, {width_key(model): 2 * size, **fixed}, "hidden")
    if any(isinstance(module, Expert) for module in model.modules()):
        unfuse(usual)
        unfuse(wider)
    return [
        CoordinateAxis(module, name, axis)
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
        for axis in _growing_axes(f"{path}.{name}".lstrip("."), size, usual, wider)
    ]


def width_key(model: PreTrainedModel) -> str:
    """Return the config name of the hidden size."""
    return model.config.attribute_map.get("hidden_size", "hidden_size")


def head_sizes(model: PreTrainedModel) -> dict[str, int]:
    """Return the entries that fix the head size.

    Without them it may follow from the width, also where the heads themselves cannot be removed.
    """
    stacks, config = find_architecture(model).stacks, model.config
    if not any(stack.attentions for stack in stacks) and hasattr(config, "num_attention_heads"):
        size = config.to_dict().get(HEAD_SIZE)  # as an attribute it may vary over blocks
        size = size or config.hidden_size // config.num_attention_heads
        return {HEAD_SIZE: size}
    return {
        name: _head_size(model, stack.blocks, attention)
        for stack in stacks
        for attention in stack.attentions
        for name, count in attention.entries
        if count == "size"
    }


def _head_size(model: PreTrainedModel, blocks: str, attention: Attention) -> int:
    """Return the head size of an attention of some block."""
    every = model.base_model.get_submodule(blocks).children()
    found = (
        each.get_submodule(attention.module) for each in every if has_module(each, attention.module)
    )
    return next(getattr(each, attention.size) for each in found if hasattr(each, attention.size))


def width_step(model: PreTrainedModel, fixed: Mapping[str, int]) -> int:
    """Return the number that must divide the width, 1 in most families.

    Args:
        model: The model.
        fixed: Its :func:`head_sizes`.
    """
    wider = {width_key(model): model.config.hidden_size + 1, **fixed}
    step = GROUPED if fused_experts(meta_model(model, fixed, "hidden")) else 1
    try:
        meta_model(model, wider, "hidden")
    except ShapeError:
        return lcm(step, model.config.num_attention_heads)
    return step


def _growing_axes(
    path: str, size: int, usual: PreTrainedModel, wider: PreTrainedModel
) -> list[int]:
    """Return the axis of a parameter that grows with the width.

    Raises:
        ShapeError: An axis other than the coordinates grows with it, or a stock model has no such
            parameter.
    """
    try:
        before, after = usual.get_parameter(path).shape, wider.get_parameter(path).shape
    except AttributeError as error:
        raise ShapeError(
            f"{path}: a stock model keeps this weight in another layout ({error}), so the "
            "coordinates of the residual stream cannot be taken out."
        ) from error
    axes = [axis for axis, width in enumerate(before) if after[axis] != width]
    if len(axes) > 1 or any((before[axis], after[axis]) != (size, 2 * size) for axis in axes):
        raise ShapeError(
            f"{path}: a config of another width makes {list(after)} of {list(before)}, which is "
            "more than the coordinates of the residual stream. They cannot be taken out."
        )
    return axes
