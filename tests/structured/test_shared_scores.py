"""Heads that share a position bias have one score, comparable with that of other units."""

import torch

import prunekit
from prunekit.structured.shared_scores import share_scores
from tests.support.architectures import tiny


def test_heads_with_a_shared_position_bias_have_one_score():
    """In T5 every block has equal weight, regardless of score scale."""
    model = tiny("t5")
    groups = prunekit.heads(model).groups
    scores = {
        group.name: torch.arange(1.0, group.units + 1) * 10**place
        for place, group in enumerate(groups)
    }
    shared = share_scores(groups, scores)
    stacks = {}
    for group in groups:
        if group.has_bias_columns:
            stacks.setdefault(group.stack.blocks, []).append(group.name)
    assert stacks
    for names in stacks.values():
        assert all(torch.equal(shared[name], shared[names[0]]) for name in names)
        expected = torch.stack([scores[name] for name in names]).mean(0)
        torch.testing.assert_close(shared[names[0]], expected)


def test_scores_without_a_shared_bias_are_unchanged():
    groups = prunekit.heads(tiny("llama")).groups
    scores = {group.name: torch.rand(group.units) for group in groups}
    assert share_scores(groups, scores) == scores
