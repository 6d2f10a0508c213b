"""Accuracy, exact match and loss, block by block, against stock transformers."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.distributed.ranks import Ranks
from prunekit.errors import NumericsError
from prunekit.evaluation.labelled import Rows, evaluate_rows, labelled_measures
from prunekit.evaluation.perplexity import Evaluator
from tests.support import checkpoints
from tests.support.architectures import tiny
from tests.support.checkpoints import tokenizer
from tests.support.labelled import WORDS, classifier, labelled, sentences, words

CLASSIFIER = AutoModelForSequenceClassification


def evaluator(folder):
    return Evaluator(open_checkpoint(folder), torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:.*pad token.*")
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "llama", "gpt2"])
def test_accuracy_and_loss_are_those_of_stock_on_each_sentence(tmp_path, model_type):
    folder = checkpoints.write(tmp_path / "m", model_type, head=CLASSIFIER)
    model = classifier(model_type)
    samples = labelled(model, sentences(tmp_path), "classification").first()
    right, losses = 0, []
    for row in samples.rows:
        inputs = {name: torch.tensor([row[name]]) for name in row if name != "labels"}
        with torch.no_grad():
            logits = model(**inputs).logits
        right += int(logits.argmax()) == row["labels"]
        losses.append(float(cross_entropy(logits, torch.tensor([row["labels"]]))))
    accuracy, loss = labelled_measures(evaluator(folder), samples, "classification")
    assert (accuracy["metric"], accuracy["correct"], accuracy["samples"]) == ("accuracy", right, 8)
    assert accuracy["value"] == right / 8
    assert loss["value"] == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert "accuracy: share of the samples whose class has the largest logit" in loss["protocol"]


def test_exact_match_is_that_of_greedy_decoding(tmp_path, monkeypatch):
    """The targets are what the random model itself writes, of which one is changed."""
    monkeypatch.setattr("prunekit.evaluation.labelled.HEAD_TOKENS", 8)
    folder = checkpoints.write(tmp_path / "m", "t5")
    model, plain = tiny("t5"), tokenizer()
    greedy = {"max_new_tokens": 5, "do_sample": False, "use_cache": False}
    written = [
        model.generate(torch.tensor([plain(word)["input_ids"]]), **greedy) for word, _ in WORDS
    ]
    targets = [ids[0, 1:].tolist() for ids in written]
    targets[1][-1] = (targets[1][-1] + 1) % 96
    samples = labelled(model, words(tmp_path), "seq2seq").first()
    rows = [{**row, "labels": ids} for row, ids in zip(samples.rows, targets, strict=True)]
    samples = type(samples)(rows, samples.pad, samples.description)
    with torch.no_grad():
        losses = [
            model(
                input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])
            ).loss
            * len(row["labels"])
            for row in rows
        ]
    match, loss = labelled_measures(evaluator(folder), samples, "seq2seq")
    assert (match["metric"], match["correct"], match["value"]) == ("exact match", 4, 0.8)
    tokens = sum(map(len, targets))
    assert loss["predictions"] == tokens
    assert loss["value"] == pytest.approx(float(sum(losses)) / tokens, rel=1e-5)


def test_ranks_evaluate_their_shares(tmp_path, monkeypatch):
    folder = checkpoints.write(tmp_path / "m", "bert", head=CLASSIFIER)
    samples = labelled(classifier(), sentences(tmp_path), "classification").first()
    whole = labelled_measures(evaluator(folder), samples, "classification")
    parts = []
    gathered = lambda ranks, own: parts.append(own) or parts if ranks.size > 1 else [own]  # noqa: E731
    monkeypatch.setattr(Ranks, "all_gather_object", gathered)
    for rank in range(3):
        found = labelled_measures(evaluator(folder), samples, "classification", Ranks(rank, 3))
    assert [each["value"] for each in found] == pytest.approx([each["value"] for each in whole])


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    folder = checkpoints.write(tmp_path / "m", "bert", head=CLASSIFIER)
    checkpoints.change(folder, "bert.pooler.dense.bias", lambda bias: bias.fill_(100))
    checkpoints.change(folder, "classifier.weight", lambda weight: weight.fill_(3e38))
    samples = labelled(classifier(), sentences(tmp_path), "classification").first()
    with pytest.raises(NumericsError, match="the loss of BertForSequenceClassification is"):
        labelled_measures(evaluator(folder), samples, "classification")


def test_a_folder_is_evaluated_on_each_source(tmp_path):
    folder = checkpoints.write(tmp_path / "m", "bert", head=CLASSIFIER)
    source = str(sentences(tmp_path))
    rows = Rows("classification", {"text": "sentence"}, 99, samples=3)
    found = evaluate_rows(str(folder), [source, source], rows, "cpu")
    assert [each["metric"] for each in found] == ["accuracy", "loss"] * 2
    assert found[0]["protocol"].startswith("the first 3 of 8 rows of")
