"""Narrowing of linears and parameters to some of their rows or columns.

Shapes: K kept indices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor, nn

from prunekit.models.adapters import input_parts, output_parts
from prunekit.models.orientation import stored_axis, update_features

STORED = "prunekit_stored"
"""Attribute of a parameter that is computed with in a narrower type than the checkpoint's: its
stored value."""


class Narrowing(NamedTuple):
    """A parameter that was replaced by a part of it.

    Attributes:
        before: The whole parameter, which did not change.
        after: The new one.
        axis: Axis along which indices were selected.
        keep: These indices, in their new order.
    """

    before: nn.Parameter
    after: nn.Parameter
    axis: int
    keep: Int[Tensor, " K"]

    def of(self, whole: Tensor) -> Tensor:
        """Return the same part of a tensor shaped like the parameter."""
        return whole.index_select(self.axis, self.keep.to(whole.device))


_record: ContextVar[list[Narrowing] | None] = ContextVar("narrowings", default=None)


@contextmanager
def recorded_narrowings() -> Iterator[list[Narrowing]]:
    """Collect all narrowings inside the context, in their order.

    So whoever holds parameters or tensors of their shape, such as an optimizer, can follow.
    """
    found: list[Narrowing] = []
    before = _record.set(found)
    try:
        yield found
    finally:
        _record.reset(before)


def narrow_linear(linear: Any, keep: Int[Tensor, " K"], *, outputs: bool) -> None:  # noqa: ANN401
    """Keep some outputs or inputs of an ``nn.Linear`` or ``Conv1D``, in place.

    Args:
        linear: The module; its bias is narrowed with the outputs, and its adapters likewise.
        keep: Indices that are kept, in their new order.
        outputs: True for outputs, False for inputs.
    """
    for part in output_parts(linear) if outputs else input_parts(linear):
        axis = stored_axis(part, 0 if outputs else 1)
        part.weight = narrow_parameter(part.weight, axis, keep)
        if outputs and part.bias is not None:
            part.bias = narrow_parameter(part.bias, 0, keep)
        update_features(part)


def narrow_parameter(parameter: nn.Parameter, axis: int, keep: Int[Tensor, " K"]) -> nn.Parameter:
    """Return a new parameter with some indices of an axis.

    Args:
        parameter: Its ``requires_grad`` and the parts of its gradient and of its value as stored
            (see ``STORED``) are copied.
        axis: Axis along which indices are selected.
        keep: Indices that are kept, in their new order; on any device.
    """
    selected = parameter.detach().index_select(axis, keep.to(parameter.device))
    narrowed = nn.Parameter(selected, requires_grad=parameter.requires_grad)
    done = Narrowing(parameter, narrowed, axis, keep)
    if parameter.grad is not None:
        narrowed.grad = done.of(parameter.grad)
    if (stored := getattr(parameter, STORED, None)) is not None:
        setattr(narrowed, STORED, done.of(stored))
    if (record := _record.get()) is not None:
        record.append(done)
    return narrowed
