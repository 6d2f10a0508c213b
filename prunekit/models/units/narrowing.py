"""Narrowing of linears and parameters to some of their rows or columns.

Shapes: K kept indices.
"""

from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from prunekit.models.orientation import stored_axis, update_features


def narrow_linear(linear: Any, keep: Int[Tensor, " K"], *, outputs: bool) -> None:  # noqa: ANN401
    """Keep some outputs or inputs of an ``nn.Linear`` or ``Conv1D``, in place.

    Args:
        linear: The module; its bias is narrowed with the outputs.
        keep: Indices that are kept, in their new order.
        outputs: True for outputs, False for inputs.
    """
    axis = stored_axis(linear, 0 if outputs else 1)
    linear.weight = narrow_parameter(linear.weight, axis, keep)
    if outputs and linear.bias is not None:
        linear.bias = narrow_parameter(linear.bias, 0, keep)
    update_features(linear)


def narrow_parameter(parameter: nn.Parameter, axis: int, keep: Int[Tensor, " K"]) -> nn.Parameter:
    """Return a new parameter with some indices of an axis.

    Args:
        parameter: Its ``requires_grad`` is copied.
        axis: Axis along which indices are selected.
        keep: Indices that are kept, in their new order; on any device.
    """
    selected = parameter.detach().index_select(axis, keep.to(parameter.device))
    return nn.Parameter(selected, requires_grad=parameter.requires_grad)
