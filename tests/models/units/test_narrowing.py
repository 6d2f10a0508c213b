"""Narrowed linears use only the kept rows or the kept columns."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunekit.models.units.narrowing import narrow_linear, narrow_parameter


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
