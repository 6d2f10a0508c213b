"""Modules in the place of blocks, and blank embeddings."""

import pytest
import torch
from torch import nn

from prunekit.models.sequential.block_proxies import (
    EncoderOutput,
    Follower,
    PassThrough,
    Recorder,
    blank_embeddings,
)


class Block(nn.Module):
    kind = "sliding"

    def forward(self, hidden_states, scale=1):
        return hidden_states * scale, "bias"


def test_a_recorder_runs_the_block_and_followers_answer_in_its_form():
    recorder = Recorder(Block())
    follower = Follower(Block(), recorder)
    x = torch.ones(1, 2, 3)
    y, bias = recorder(x, scale=2)
    assert torch.equal(y, x * 2)
    assert bias == "bias"
    assert follower.kind == recorder.kind == "sliding"
    assert follower(y, "mask") == (y, "bias")


def test_a_block_that_is_passed_through_keeps_the_arguments():
    x, other = torch.ones(1), torch.zeros(1)
    assert PassThrough(Block(), None)(x) is x
    passing = PassThrough(Block(), ("bias",), other)
    assert passing(x, 3, mask=None) == (other, "bias")
    assert passing.__dict__["call"] == ((3,), {"mask": None})
    assert [*passing.parameters()] == []


def test_blank_embeddings_are_zeros_of_the_ids_shape_for_a_time():
    table = nn.Embedding(5, 3)
    ids = torch.tensor([[1, 2]])
    with blank_embeddings(table, torch.ones(1, dtype=torch.float64)):
        found = table(ids)
        assert table(torch.Size([2, 7])).shape == (7, 3)
    assert found.shape == (1, 2, 3)
    assert found.dtype == torch.float64
    assert not found.any()
    assert table(ids).any()


def test_an_encoder_output_has_no_other_outputs():
    output = EncoderOutput(torch.ones(1))
    assert output.router_logits is None
    assert torch.equal(output[0], torch.ones(1))
    with pytest.raises(AttributeError):
        output.__missing__  # noqa: B018
