"""Salience against its formula on observed inputs and gradients."""

import torch

import prunekit
from prunekit.structured.batches import losses
from tests.support.rankers import TOKENS
from tests.support.units import randomized_model


def test_salience_is_the_product_of_two_sums_and_the_root_of_a_kurtosis():
    """The score is (Σ|h|)(Σ|g|) + √Kurt, not Σ|h g|.

    Kurt is the excess kurtosis of a neuron's weights, clamped at 0.
    """
    model = randomized_model("llama")
    model.requires_grad_(requires_grad=False)
    gates = prunekit.neurons(model)
    reader = gates.linear_groups[1].reader.linear
    seen = []
    handle = reader.register_forward_pre_hook(
        lambda _, x: seen.append(x[0].detach().requires_grad_()) or (seen[-1],)
    )
    given = [{"input_ids": part} for part in TOKENS.split(5)]
    sums = [0, 0]
    for part in given:
        loss, predictions = losses(model, part)
        (g,) = torch.autograd.grad(loss.sum() / predictions.sum(), [seen[-1]])
        for index, x in enumerate((seen[-1], g)):
            sums[index] = sums[index] + x.detach().abs().double().sum((0, 1))
    handle.remove()
    weight = reader.weight.double()
    z = (weight - weight.mean(0)) / weight.std(0)
    kurtosis = (z**4).mean(0) - 3
    found = gates.score("salience", given)[gates.linear_groups[1].name]
    torch.testing.assert_close(
        found, sums[0] * sums[1] + kurtosis.clamp_min(0).sqrt(), rtol=1e-4, atol=1e-9
    )
    found = gates.score("salience", given, outliers=False)[gates.linear_groups[1].name]
    torch.testing.assert_close(found, sums[0] * sums[1], rtol=1e-4, atol=1e-9)
