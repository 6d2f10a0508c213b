"""Factors of experts: 0 reroutes tokens, others multiply outputs, with gradients."""

import pytest
import torch

import prunekit
from prunekit.errors import CheckpointError
from prunekit.models.units.expert_gate import routing
from tests.support.units import batch, randomized_model


def test_factors_of_samples_multiply_the_outputs_of_their_tokens():
    model = randomized_model("mixtral")
    gates, given = prunekit.experts(model), batch(model)
    gate = gates.gates[gates.groups[0].name]
    outputs = []
    gates.groups[0].module.register_forward_hook(lambda *seen: outputs.append(seen[2]))
    with torch.no_grad():
        model(**given)
        with gate.holding(torch.stack([torch.ones(1, 4), torch.full((1, 4), 0.5)])):
            model(**given)
    before, after = (output.view(2, -1, 32) for output in outputs)
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(after[1], before[1] / 2)


def test_the_gradient_by_a_gate_is_that_of_the_shares():
    model = randomized_model("mixtral")
    gates, given = prunekit.experts(model), batch(model)
    value = torch.ones(4, requires_grad=True)
    with gates.gates[gates.groups[1].name].holding(value):
        (found,) = torch.autograd.grad(model(**given).logits.square().mean(), value)
    assert found.abs().min() > 0
    step, losses = 1e-2, []
    for sign in (1, -1):
        shifted = torch.tensor([1 + sign * step, 1, 1, 1])
        with gates.gates[gates.groups[1].name].holding(shifted), torch.no_grad():
            losses.append(float(model(**given).logits.double().square().mean()))
    assert float(found[0]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-2)


def test_experts_that_are_called_in_another_way_are_refused():
    with pytest.raises(CheckpointError, match="mlp: they are not called with"):
        routing("mlp", (torch.ones(3, 2),))
