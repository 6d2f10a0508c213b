"""LLM-Pruner: the sum of |W · ∂L/∂W| over a unit.

``test_parameter_gradient.py`` compares its scores to a backward pass.
"""

import torch

import prunekit
from tests.support.rankers import TOKENS
from tests.support.units import randomized_model


def test_a_unit_without_weights_has_no_importance():
    model = randomized_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 7] = 0
        model.model.layers[0].mlp.up_proj.weight[7] = 0
        model.model.layers[0].mlp.gate_proj.weight[7] = 0
    scores = prunekit.neurons(model).score("llm-pruner", TOKENS)["model.layers.0.mlp.down_proj"]
    assert scores[7] == 0
    assert scores.argmin() == 7
    assert int((scores > 0).sum()) == 63
