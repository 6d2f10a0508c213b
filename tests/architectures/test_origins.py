"""Origins of tensors, and what blocks read of each other."""

import torch
from torch import nn
from transformers import PreTrainedConfig

from prunekit.architectures.block_lists import BlockList
from prunekit.architectures.forward_trace import traced_forward
from prunekit.architectures.origins import (
    BLOCKS,
    EMBEDDINGS,
    TOKENS,
    BlockChain,
    Origins,
    identity,
    mark,
    origins,
)
from tests.support.architectures import tiny
from tests.support.toy_model import Toy


def test_a_view_is_the_same_tensor_and_a_changed_one_is_another():
    x = torch.zeros(1, 4, 8)
    before = identity(x)
    assert identity(x[0]) == before
    assert identity(x.clone()) != before
    x.add_(1)
    assert identity(x) != before


def test_the_last_multiplied_weight_and_the_embeddings_are_origins():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    mark(x, {EMBEDDINGS})
    with torch.no_grad(), Origins(model):
        y = model(x)
        shape = torch.zeros_like(y)
    assert origins(y) == {"1.weight", EMBEDDINGS}
    assert origins(shape) == set()
    assert origins(torch.zeros(1)) == set()


class Handing(nn.Module):
    """A block that returns a state beside the hidden states, which the next one adds."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, state=None):
        y = self.linear(x if state is None else x + state)
        return y, y * 2


def chain_of(run):
    blocks = nn.ModuleList(Handing() for _ in range(3))
    chain = BlockChain(blocks)
    x = torch.randn(1, TOKENS, 8)
    mark(x, {EMBEDDINGS})
    with torch.no_grad(), Origins(blocks):
        run(blocks, x)
    chain.remove()
    return chain


def test_a_state_that_each_block_hands_on_is_carried():
    def run(blocks, x):
        state = None
        for block in blocks:
            x, state = block(x, state)

    chain = chain_of(run)
    assert (chain.carries, chain.broken, chain.embedded) == (True, [], set())


def test_a_state_of_an_earlier_block_breaks_the_chain():
    def run(blocks, x):
        x, first = blocks[0](x)
        x, _ = blocks[1](x, first)
        blocks[2](x, first)

    assert chain_of(run).broken == ["2"]


def test_embeddings_that_a_block_reads_besides_are_noted_and_break_nothing():
    def run(blocks, x):
        y, _ = blocks[0](x)
        y, _ = blocks[1](y, x)
        blocks[2](y, x * 3)

    chain = chain_of(run)
    assert (chain.carries, chain.broken, chain.embedded) == (False, [], {"1", "2"})


def test_hidden_states_that_change_between_blocks_break_the_chain():
    def run(blocks, x):
        y, _ = blocks[0](x)
        blocks[1](y + 1)

    assert chain_of(run).broken == ["1"]
    assert BLOCKS not in chain_of(run).embedded


def test_samples_may_be_a_later_dimension():
    def run(blocks, x):
        blocks[0](x.expand(3, 1, TOKENS, 8))

    assert chain_of(run).sample_axis == 1
    assert chain_of(lambda blocks, x: blocks[0](x[0])).broken == ["0"]


def test_the_chain_of_a_model_is_that_of_its_trace():
    with traced_forward(Toy(PreTrainedConfig()), BlockList("blocks")) as trace:
        assert trace.chain.broken == []
    with traced_forward(tiny("gemma4_text").base_model, BlockList("layers")) as trace:
        assert trace.reads_ids
        assert trace.chain.broken == []
