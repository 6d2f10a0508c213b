"""Batches of labelled files in Python."""

import re

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import prunekit
from prunekit.config.train_table import Training
from prunekit.errors import ConfigError
from prunekit.structured.batches import losses
from prunekit.structured.labelled_batches import labelled_batches
from prunekit.training.recover import recover
from tests.support.architectures import tiny
from tests.support.checkpoints import tokenizer
from tests.support.labelled import SENTENCES, classifier, sentences, words, write_rows


def test_batches_hold_each_row_once_with_its_label(tmp_path):
    found = labelled_batches(sentences(tmp_path), tokenizer(), classifier(), batch=3)
    assert sorted(len(batch["labels"]) for batch in found) == [2, 3, 3]
    rows = [
        (ids[mask.bool()].tolist(), int(label))
        for batch in found
        for ids, mask, label in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        )
    ]
    assert sorted(rows) == sorted((tokenizer()(text)["input_ids"], at) for text, at in SENTENCES)


def test_the_loss_of_a_sample_does_not_depend_on_its_padding(tmp_path):
    for model, file, task in (
        (classifier(), sentences(tmp_path), "classification"),
        (tiny("t5"), words(tmp_path), "seq2seq"),
    ):
        sums = []
        for batch in (1, 99):
            found = labelled_batches(file, tokenizer(), model, task, batch=batch)
            with torch.no_grad():
                sums.append(sum(float(losses(model, each)[0].sum()) for each in found))
        assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_lengths_are_capped_by_the_model(tmp_path):
    file = write_rows(tmp_path / "long.csv", ("text", "label"), ("x" * 200, 1), ("y", 0))
    for length, expected in ((None, 64), (7, 7)):
        (batch,) = labelled_batches(file, tokenizer(), classifier(), length=length)
        assert batch["input_ids"].shape[1] == expected


def test_units_are_ranked_and_a_model_is_trained_on_them(tmp_path):
    model = tiny("roberta", AutoModelForSequenceClassification)
    found = labelled_batches(sentences(tmp_path), tokenizer(), model, batch=2)
    heads = prunekit.heads(model)
    heads.prune(heads.score("gradient", found), 0.25)
    steps = [*recover(model, found[:-1], found[-1:], Training(steps=4, every=2))]
    assert steps[-1].held_out is not None
    heads.detach()


def test_blocks_are_pruned_on_their_tokens_without_padding(tmp_path):
    """The Gram matrix of padded batches is that of the sentences one by one."""
    file, weights = sentences(tmp_path), []
    for batch in (1, 99):
        model = classifier()
        found = labelled_batches(file, tokenizer(), model, batch=batch)
        prunekit.prune(model, found, method="sparsegpt", sparsity=0.5)
        weights.append(model.bert.encoder.layer[-1].output.dense.weight)
    torch.testing.assert_close(*weights)


def test_a_decoder_is_pruned_on_the_tokens_of_its_targets(tmp_path):
    """The block before the last one sees the targets: other targets, other weights."""
    weights = []
    for target in ("abc", "abc", "xyzzy"):
        file = write_rows(tmp_path / "a.tsv", ("input", "target"), *[("cab", target)] * 3)
        model = tiny("t5")
        found = labelled_batches(file, tokenizer(), model, "seq2seq")
        prunekit.prune(model, found, method="wanda", sparsity=0.5)
        weights.append(model.decoder.block[1].layer[0].SelfAttention.k.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch: 0 is not possible: at least 1."),
        ({"samples": -1}, "samples: -1 is not possible"),
        ({"columns": {"labl": "x"}}, "columns: 'labl' is none of task 'classification', which has"),
        ({"task": "seq2seq"}, 'task: "seq2seq" needs an encoder-decoder'),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        labelled_batches(sentences(tmp_path), tokenizer(), classifier(), **options)
