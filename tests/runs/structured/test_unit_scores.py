"""Scores of units that a model cannot leave out, and of those that share a bias."""

import pytest
import torch

import prunekit
from prunekit.runs.structured.unit_scores import first_tokens, raise_scores, share_scores
from tests.support.architectures import tiny


def batch(samples, tokens):
    return {"input_ids": torch.arange(samples * tokens).view(samples, tokens)}


@pytest.mark.parametrize(
    ("tokens", "samples"), [(1, [1]), (12, [1]), (30, [2]), (48, [3, 1]), (10**6, [3, 3])]
)
def test_the_first_samples_have_at_most_so_many_tokens(tokens, samples):
    few = first_tokens([batch(3, 12), batch(3, 12)], tokens)
    assert [len(each["input_ids"]) for each in few] == samples
    assert torch.equal(few[0]["input_ids"], batch(3, 12)["input_ids"][: samples[0]])


def test_heads_with_a_shared_position_bias_have_one_score():
    """In T5 every block has equal weight, regardless of score scale."""
    model = tiny("t5")
    groups = prunekit.heads(model).linear_groups
    scores = {
        group.name: torch.arange(1.0, group.units + 1) * 10**place
        for place, group in enumerate(groups)
    }
    shared = share_scores(groups, scores)
    stacks = {}
    for group in groups:
        if group.has_bias_columns:
            stacks.setdefault(group.stack.blocks, []).append(shared[group.name])
    assert stacks
    for same in stacks.values():
        assert all(torch.equal(score, same[0]) for score in same)
        expected = torch.arange(1.0, len(same[0]) + 1)
        torch.testing.assert_close(same[0], len(same) * expected / expected.sum())


def test_scores_without_a_shared_bias_are_unchanged():
    groups = prunekit.heads(tiny("llama")).linear_groups
    scores = {group.name: torch.rand(group.units) for group in groups}
    assert share_scores(groups, scores) == scores


def test_units_that_have_to_stay_are_above_all_others():
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0, -1.0])}
    raised = raise_scores(scores, {"a": [0]})
    assert raised["a"].tolist() == [6, 2]
    assert raised["b"] is scores["b"]
    assert scores["a"].tolist() == [1, 2]
