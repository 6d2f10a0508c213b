"""Axes of parameters along which the coordinates of the residual stream lie.

They are those that grow with the width in the config.
"""

from typing import NamedTuple, cast

from torch import nn
from transformers import PreTrainedModel

from prunekit.architectures import find_architecture
from prunekit.errors import ShapeError
from prunekit.models.units.meta_model import meta_model


class CoordinateAxis(NamedTuple):
    """Axis of a parameter along which the coordinates lie."""

    module: nn.Module
    name: str
    axis: int

    @property
    def parameter(self) -> nn.Parameter:
        """The current parameter."""
        return cast("nn.Parameter", getattr(self.module, self.name))


def coordinate_axes(model: PreTrainedModel) -> list[CoordinateAxis]:
    """Return every parameter axis that grows with the width in the config.

    Raises:
        ShapeError: An axis other than the coordinates grows too.
    """
    size: int = model.config.hidden_size
    usual = meta_model(model, head_sizes(model), "hidden")
    wider = meta_model(model, {width_key(model): 2 * size, **head_sizes(model)}, "hidden")
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

    Without them it may follow from the width.
    """
    return {
        name: getattr(block.get_submodule(attention.module), attention.size)
        for stack in find_architecture(model).stacks
        for block in [model.base_model.get_submodule(stack.blocks)[0]]  # pyright: ignore
        for attention in stack.attentions
        for name, count in attention.entries
        if count == "size"
    }


def width_step(model: PreTrainedModel) -> int:
    """Return the number that must divide the width, 1 in most families."""
    wider = {width_key(model): model.config.hidden_size + 1, **head_sizes(model)}
    try:
        meta_model(model, wider, "hidden")
    except ShapeError:
        return model.config.num_attention_heads
    return 1


def _growing_axes(
    path: str, size: int, usual: PreTrainedModel, wider: PreTrainedModel
) -> list[int]:
    """Return the axis of a parameter that grows with the width.

    Raises:
        ShapeError: An axis other than the coordinates grows with it.
    """
    before, after = usual.get_parameter(path).shape, wider.get_parameter(path).shape
    axes = [axis for axis, width in enumerate(before) if after[axis] != width]
    if len(axes) > 1 or any((before[axis], after[axis]) != (size, 2 * size) for axis in axes):
        raise ShapeError(
            f"{path}: a config of another width makes {list(after)} of {list(before)}, which is "
            "more than the coordinates of the residual stream. They cannot be taken out."
        )
    return axes
