"""Narrowed linears use only the kept rows or the kept columns."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunekit.models.units.narrowing import (
    ValueChange,
    change_values,
    narrow_linear,
    narrow_parameter,
    recorded_steps,
)


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(6, 5), lambda: Conv1D(5, 6)], ids=["linear", "conv1d"]
)
def test_a_narrowed_linear_is_the_part_of_the_whole(make):
    linear, keep = make().double(), torch.tensor([0, 3, 4])
    nn.init.normal_(linear.bias)
    x = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = linear(x)
    narrow_linear(linear, keep, outputs=True)
    torch.testing.assert_close(linear(x), whole[:, keep])
    zeroed = torch.zeros_like(x)
    zeroed[:, keep] = x[:, keep]
    expected = linear(zeroed)
    narrow_linear(linear, keep, outputs=False)
    torch.testing.assert_close(linear(x[:, keep]), expected)


def test_a_narrowed_parameter_is_a_copy_that_is_as_frozen():
    whole = nn.Parameter(torch.arange(6.0).view(2, 3), requires_grad=False)
    part = narrow_parameter(whole, 1, torch.tensor([2, 0]))
    assert part.tolist() == [[2, 0], [5, 3]]
    assert not part.requires_grad
    part.zero_()
    assert whole.sum() == 15


def test_narrowings_are_recorded_in_order_and_apply_to_tensors_of_the_same_shape():
    linear, moment = nn.Linear(6, 5), torch.arange(30.0).view(5, 6)
    weight = linear.weight
    weight.grad = moment + 1
    narrow_linear(linear, torch.arange(6), outputs=False)
    with recorded_steps() as found:
        narrow_linear(linear, torch.tensor([1, 4]), outputs=True)
        narrow_linear(linear, torch.tensor([5, 0]), outputs=False)
    outputs, bias, inputs = found
    assert (outputs.axis, bias.axis, inputs.axis) == (0, 0, 1)
    assert outputs.after is inputs.before
    assert inputs.after is linear.weight
    assert bias.after is linear.bias
    assert inputs.of(outputs.of(moment)).tolist() == [[11, 6], [29, 24]]
    assert linear.weight.grad.tolist() == [[12, 7], [30, 25]]
    assert weight.grad is not None
    narrow_linear(linear, torch.tensor([0]), outputs=True)
    assert len(found) == 3


def test_a_part_is_put_back_among_zeros():
    whole = nn.Parameter(torch.arange(1.0, 7).view(2, 3))
    with recorded_steps() as found:
        narrow_parameter(whole, 1, torch.tensor([0, 2]))
    (step,) = found
    assert step.put_back(step.of(whole)).tolist() == [[1, 0, 3], [4, 0, 6]]


def test_value_changes_are_recorded_with_narrowings_and_apply_to_other_tensors():
    weight, other = nn.Parameter(torch.ones(3)), torch.full((3,), 5.0)
    with recorded_steps() as found:
        narrow_parameter(weight, 0, torch.arange(3))
        change_values(weight, partial(torch.Tensor.mul_, other=2))
    change = found[1]
    assert isinstance(change, ValueChange)
    assert change.parameter is weight
    change.change(other)
    assert weight.tolist() == [2, 2, 2]
    assert other.tolist() == [10, 10, 10]
    assert weight.grad_fn is None
