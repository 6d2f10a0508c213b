"""Scores of units that a model cannot leave out, and of those that share a bias."""

import pytest
import torch

from prunekit.runs.structured.unit_scores import first_tokens, raise_scores


def batch(samples, tokens):
    return {"input_ids": torch.arange(samples * tokens).view(samples, tokens)}


@pytest.mark.parametrize(
    ("tokens", "samples"), [(1, [1]), (12, [1]), (30, [2]), (48, [3, 1]), (10**6, [3, 3])]
)
def test_the_first_samples_have_at_most_so_many_tokens(tokens, samples):
    few = first_tokens([batch(3, 12), batch(3, 12)], tokens)
    assert [len(each["input_ids"]) for each in few] == samples
    assert torch.equal(few[0]["input_ids"], batch(3, 12)["input_ids"][: samples[0]])


def test_units_that_have_to_stay_are_above_all_others():
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0, -1.0])}
    raised = raise_scores(scores, {"a": [0]})
    assert raised["a"].tolist() == [6, 2]
    assert raised["b"] is scores["b"]
    assert scores["a"].tolist() == [1, 2]
