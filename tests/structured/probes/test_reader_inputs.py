"""Observed inputs of reading linears, before and after gates, and their gradients."""

import torch

import prunekit
from prunekit.structured.gated_model import GatedModel
from prunekit.structured.probes.reader_inputs import activations_and_gradients, observe_inputs
from tests.support.units import batch, randomized_model


def observed(gated, **settings):
    rows = {}
    observe_inputs(gated, lambda group, x: rows.update({group.name: x.clone()}), **settings)
    return rows


def test_inputs_are_without_padding_and_zero_after_a_closed_gate():
    model = randomized_model("llama")
    gates = prunekit.neurons(model)
    given = batch(model)
    group = gates.linear_groups[1]
    gates.gate(1, 5, 0.0)
    gated = GatedModel(model, [group], gates.gates, [given])
    after, before = (observed(gated, after_gates=each)[group.name] for each in (True, False))
    assert after.shape == (int(given["attention_mask"].sum()), 64)
    assert not after[:, 5].any()
    assert before[:, 5].any()
    others = torch.arange(64) != 5
    assert torch.equal(after[:, others], before[:, others])


def test_the_gradient_by_the_output_times_the_weight_is_that_by_the_input():
    model = randomized_model("llama")
    model.requires_grad_(requires_grad=False)
    gates = prunekit.neurons(model)
    group = gates.linear_groups[0]
    given = {"input_ids": torch.arange(3, 12)[None]}
    gated = GatedModel(model, [group], gates.gates, [given])
    (_,), (by_input,), count = activations_and_gradients(gated, given, [group.reader.linear])
    (_,), (by_output,), _ = activations_and_gradients(
        gated, given, [group.reader.linear], outputs=True
    )
    assert count.tolist() == [8]
    expected = by_output @ group.reader.linear.weight
    torch.testing.assert_close(by_input, expected, rtol=1e-4, atol=1e-6)
