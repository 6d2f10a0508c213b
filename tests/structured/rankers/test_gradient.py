"""Gate gradients against one backward pass per sample."""

import pytest
import torch

import prunekit
from tests.support.units import batch, randomized_model


def test_gradient_is_the_mean_of_each_samples_absolute_gradient_by_the_gate():
    """The mean over samples of |∂L/∂ξ|, not the absolute mean gradient.

    Padding tokens are not predicted.
    """
    model = randomized_model("llama")
    gates = prunekit.heads(model)
    given = batch(model)
    expected = {site.name: torch.zeros(2) for site in gates.linear_groups}
    for row, length in ((0, 6), (1, 9)):
        values = [torch.ones(2, requires_grad=True) for _ in gates.linear_groups]
        ids = given["input_ids"][row : row + 1, :length]
        for gate, value in zip(gates.gates.values(), values, strict=True):
            gate.value = value
        model(input_ids=ids, labels=ids).loss.backward()
        for name, value in zip(expected, values, strict=True):
            expected[name] += value.grad.abs() / 2
    for gate in gates.gates.values():
        gate.value = torch.ones(2)
    found = gates.score("gradient", [given])
    for name, score in found.items():
        torch.testing.assert_close(score.float(), expected[name], rtol=1e-4, atol=1e-6)
    for score in gates.score("gradient", [given], normalised=True).values():
        assert float(score.norm()) == pytest.approx(1)
