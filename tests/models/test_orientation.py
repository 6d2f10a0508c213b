"""The orientation of linear weights, for ``nn.Linear`` and GPT-2's ``Conv1D``."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunekit.models.orientation import (
    features,
    outputs_first,
    stored_axis,
    stored_transposed,
    update_features,
    weight_matrix,
)

LINEARS = [lambda: nn.Linear(6, 4), lambda: Conv1D(4, 6)]  # both 6 inputs, 4 outputs


@pytest.mark.parametrize("make", LINEARS)
def test_the_weight_matrix_computes_the_layer(make):
    linear, x = make(), torch.randn(3, 6)
    assert features(linear) == (4, 6)
    expected = linear(x) - linear.bias
    torch.testing.assert_close(x @ weight_matrix(linear).T, expected)


@pytest.mark.parametrize("make", LINEARS)
@torch.no_grad()
def test_the_weight_matrix_is_a_view(make):
    linear = make()
    weight_matrix(linear)[1] = 0
    x = torch.randn(3, 6)
    assert torch.equal(linear(x)[:, 1], linear.bias[1].expand(3))


@pytest.mark.parametrize("make", LINEARS)
def test_outputs_first_is_its_own_converse(make):
    linear = make()
    assert outputs_first(linear, weight_matrix(linear)).shape == linear.weight.shape
    assert stored_transposed(linear) == isinstance(linear, Conv1D)


@pytest.mark.parametrize("make", LINEARS)
def test_the_stored_axis_has_the_length_of_its_features(make):
    linear = make()
    assert [linear.weight.shape[stored_axis(linear, axis)] for axis in (0, 1)] == [4, 6]


@pytest.mark.parametrize("make", LINEARS)
def test_a_narrowed_layer_states_its_new_features(make):
    linear = make()
    rows = torch.arange(2)
    linear.weight = nn.Parameter(linear.weight.index_select(stored_axis(linear, 0), rows))
    linear.bias = nn.Parameter(linear.bias[:2])
    update_features(linear)
    assert linear(torch.randn(3, 6)).shape == (3, 2)
    stated = (linear.nf, linear.nx) if isinstance(linear, Conv1D) else linear.weight.shape
    assert (*stated,) == (2, 6)
