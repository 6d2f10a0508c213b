"""Batches and losses for every kind of model head."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

import prunekit
from prunekit.errors import ConfigError
from prunekit.structured.batches import losses, mean_loss
from tests.support.architectures import tiny
from tests.support.rankers import TOKENS, flat
from tests.support.units import batch, randomized_model


def test_a_classifier_is_ranked_by_its_labels():
    model = tiny("bert", AutoModelForSequenceClassification)
    given = {"input_ids": TOKENS, "labels": torch.arange(10) % 2}
    loss, count = losses(model, given)
    logits = model(**given).logits
    torch.testing.assert_close(loss, cross_entropy(logits, given["labels"], reduction="none"))
    assert count.tolist() == [1] * 10
    assert flat(prunekit.heads(model).score("gradient", [given])).min() > 0


def test_the_mean_loss_counts_predictions_not_batches_and_leaves_padding_out():
    """A mean of batch means would overweight the short batch."""
    model = randomized_model("llama")
    given = batch(model)
    parts = [given["input_ids"][:1, :6], given["input_ids"][1:]]
    with torch.no_grad():
        truth = [cross_entropy(model(p).logits[0, :-1], p[0, 1:], reduction="sum") for p in parts]
    assert mean_loss(model, [given]) == pytest.approx(float(sum(truth)) / (5 + 8), rel=1e-5)


def test_losses_without_labels_are_refused_where_they_are_needed():
    with pytest.raises(ConfigError, match="loss of BertForMaskedLM needs labels"):
        prunekit.heads(tiny("bert")).score("gradient", TOKENS)
    with pytest.raises(ConfigError, match="reads decoder_input_ids or labels"):
        prunekit.heads(tiny("t5")).score("output-norm", TOKENS)
