"""Gradients of all weights against one backward pass of the mean loss.

Frozen weights are included.
"""

import torch

from prunekit.structured.batches import losses
from prunekit.structured.gated_model import GatedModel
from prunekit.structured.probes.weight_gradients import weight_gradients
from tests.support.units import randomized_model


def test_the_gradient_is_that_of_the_mean_over_all_predictions():
    model = randomized_model("llama")
    linear = model.model.layers[0].mlp.down_proj
    linear.weight.requires_grad_(requires_grad=False)
    ids = torch.arange(3, 30).view(3, 9)
    found = weight_gradients(
        GatedModel(model, [], {}, [{"input_ids": part} for part in ids.split(2)]), [linear]
    )
    assert not linear.weight.requires_grad
    linear.weight.requires_grad_(requires_grad=True)
    loss, predictions = losses(model, {"input_ids": ids})
    (expected,) = torch.autograd.grad(loss.sum() / predictions.sum(), [linear.weight])
    torch.testing.assert_close(found[linear], expected, rtol=1e-4, atol=1e-6)
