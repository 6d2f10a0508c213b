"""Batches through the whole model: gradients of the summed loss, and losses of variants."""

from contextlib import nullcontext

import pytest
import torch

import prunekit
from prunekit.structured.batches import losses, mean_loss
from prunekit.structured.forward import WholeModel
from tests.support.units import batch, randomized_model


def test_gradients_are_those_of_the_loss_summed_over_predictions():
    model = randomized_model("llama")
    given, weight = batch(model), model.model.layers[0].mlp.down_proj.weight
    (found,), predictions = WholeModel(model).gradients(given, lambda: [weight])
    loss, counted = losses(model, given)
    (expected,) = torch.autograd.grad(loss.sum(), weight)
    assert torch.equal(found, expected)
    assert torch.equal(predictions, counted)


def test_the_loss_is_measured_in_each_variant_and_the_model_is_as_before():
    model = randomized_model("gpt2")
    given = [batch(model)]
    with prunekit.blocks(model) as blocks:
        gate = blocks.gates["transformer.h"]
        closed = gate.value.clone().index_fill_(0, torch.tensor(0), 0)
        variants = [nullcontext(), gate.holding(closed)]
        dense, without = WholeModel(model, given).mean_losses(variants)
        assert dense == mean_loss(model, given)
        blocks.gate(0, 0, 0.0)
        assert without == pytest.approx(mean_loss(model, given), rel=1e-6)
        assert without != dense
