"""Narrowing of linears and parameters to some of their rows or columns.

A removal of units changes parameters in two ways only: it narrows them, or changes their values.
Both are recorded, so that whoever holds tensors of the same shape can follow: an optimizer, or the
files of a model that is not in memory.

Shapes: K kept indices.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prunekit.models.adapters import input_parts, output_parts
from prunekit.models.orientation import stored_axis, update_features

STORED = "prunekit_stored"
"""Attribute of a parameter that is computed with in a narrower type than the checkpoint's: its
stored value."""


class Narrowing(NamedTuple):
    """A parameter or buffer that was replaced by a part of it.

    Attributes:
        before: The whole one, which did not change.
        after: The new one.
        axis: Axis along which indices were selected.
        keep: These indices, in their new order.
    """

    before: Tensor
    after: Tensor
    axis: int
    keep: Int[Tensor, " K"]

    def of(self, whole: Tensor) -> Tensor:
        """Return the same part of a tensor shaped like the parameter."""
        return whole.index_select(self.axis, self.keep.to(whole.device))

    def put_back(self, part: Tensor) -> Tensor:
        """Return a whole tensor that is 0 outside of its part."""
        whole = part.new_zeros(self.before.shape)
        return whole.index_copy_(self.axis, self.keep.to(part.device), part)


class ValueChange(NamedTuple):
    """A parameter whose values were changed.

    Attributes:
        parameter: The parameter.
        change: Changes a tensor shaped like it in the same way, in place.
    """

    parameter: nn.Parameter
    change: Callable[[Tensor], object]


Step = Narrowing | ValueChange
"""Change of one parameter in a removal of units."""

_record: ContextVar[list[Step] | None] = ContextVar("steps", default=None)


@contextmanager
def recorded_steps() -> Iterator[list[Step]]:
    """Collect all narrowings and value changes inside the context, in order."""
    found: list[Step] = []
    before = _record.set(found)
    try:
        yield found
    finally:
        _record.reset(before)


def _add_to_record(step: Step) -> None:
    if (record := _record.get()) is not None:
        record.append(step)


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
    done = _narrowed(Narrowing(parameter, narrowed, axis, keep))
    if parameter.grad is not None:
        narrowed.grad = done.of(parameter.grad)
    return narrowed


def narrow_buffer(buffer: Tensor, axis: int, keep: Int[Tensor, " K"]) -> Tensor:
    """Return some indices of a buffer, as :func:`narrow_parameter` does."""
    done = Narrowing(buffer, buffer.index_select(axis, keep.to(buffer.device)), axis, keep)
    return _narrowed(done).after


def _narrowed(done: Narrowing) -> Narrowing:
    """Record a narrowing, also of the value as stored."""
    if (stored := getattr(done.before, STORED, None)) is not None:
        setattr(done.after, STORED, done.of(stored))
    _add_to_record(done)
    return done


@torch.no_grad()
def change_values(parameter: nn.Parameter, change: Callable[[Tensor], object]) -> None:
    """Change the values of a parameter, in place.

    ``change`` does it to any tensor of the parameter's shape.
    """
    change(parameter)
    _add_to_record(ValueChange(parameter, change))
