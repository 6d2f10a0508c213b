"""A linear without inputs or outputs: its output, gradients, and the lack of a weight."""

import torch
from torch import nn
from transformers import initialization

from prunekit.architectures.empty_linear import EmptyLinear


def test_without_inputs_the_output_is_the_bias_or_zeros():
    x = torch.randn(2, 3, 4, requires_grad=True)
    bias = nn.Parameter(torch.randn(5))
    output = EmptyLinear(0, 5, bias)(x[..., :0])
    assert torch.equal(output, bias.expand(2, 3, 5))
    output.sum().backward()
    assert torch.equal(bias.grad, torch.full((5,), 6.0))
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert not EmptyLinear(0, 5, None)(x[..., :0]).any()


def test_without_outputs_there_are_none_and_transformers_initializes_no_weight():
    linear = EmptyLinear(4, 0, None)
    assert linear(torch.randn(2, 3, 4)).shape == (2, 3, 0)
    assert initialization.normal_(linear.weight) is linear.weight
    assert [*linear.state_dict()] == [*linear.parameters()] == []
