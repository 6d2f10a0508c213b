"""Parameter gradients and LLM-Pruner against one backward pass."""

import pytest

import prunekit
from prunekit.structured.batches import losses
from tests.support.rankers import TOKENS
from tests.support.units import randomized_model


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_parameter_gradients_and_llm_pruner_are_sums_over_the_weights_of_a_unit(model_type):
    """The reference is one backward pass over all predictions.

    Frozen weights are included.
    """
    model = randomized_model(model_type)
    gates = prunekit.neurons(model)
    site = gates.linear_groups[1]
    linears = [part.linear for part in (*site.writers, site.reader)]
    for linear in linears:
        linear.weight.requires_grad_(requires_grad=False)
    norms = gates.score("parameter-gradient", TOKENS)[site.name]
    products = gates.score("llm-pruner", TOKENS)[site.name]
    assert not any(linear.weight.requires_grad for linear in linears)
    model.requires_grad_(requires_grad=True)
    loss, predictions = losses(model, {"input_ids": TOKENS})
    (loss.sum() / predictions.sum()).backward()
    expected_norm = expected_product = 0.0
    for part in (*site.writers, site.reader):
        weight, gradient = part.linear.weight, part.linear.weight.grad
        if model_type == "gpt2":
            weight, gradient = weight.T, gradient.T
        if part is site.reader:
            weight, gradient = weight.T, gradient.T
        at = part.index[3].flatten()
        expected_norm += gradient[at].norm().item()
        expected_product += (weight * gradient)[at].abs().sum().item()
    assert float(norms[3]) == pytest.approx(expected_norm, rel=1e-4)
    assert float(products[3]) == pytest.approx(expected_product, rel=1e-4)
