"""A batch is shared by ranks, of which some may have no sample."""

import pytest
import torch

from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.training.data_parallel import own_shares, training_step
from tests.support.units import randomized_model

IDS = torch.randint(3, 96, (4, 7), generator=torch.Generator().manual_seed(5))
MASK = (torch.arange(7) < torch.tensor([7, 3, 5, 2])[:, None]).long()
BATCH = {"input_ids": IDS, "attention_mask": MASK}


class Recorded(Ranks):
    """A rank whose collectives record what it adds."""

    def __init__(self, rank, size):
        super().__init__(rank, size)
        self.sent = []

    def all_reduce_sum(self, tensor, purpose):
        self.sent.append(tensor.clone())


def gradients(ranks):
    """Return loss and gradients of a step, as far as they are of one rank."""
    model = randomized_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = training_step(model, BATCH, optimizer, ranks).loss
    return loss, [each.grad for each in model.parameters()]


@pytest.mark.parametrize("size", [2, 3, 6])
def test_losses_and_gradients_of_all_ranks_add_up_to_those_of_one_process(size):
    loss, expected = gradients(SINGLE)
    parts = [gradients(Recorded(rank, size)) for rank in range(size)]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-6)
    for number, truth in enumerate(expected):
        total = sum(each[number] for _, each in parts if each[number] is not None)
        torch.testing.assert_close(total, truth, rtol=1e-4, atol=1e-7)


def test_a_step_is_one_collective():
    ranks = Recorded(0, 2)
    _, found = gradients(ranks)
    (sent,) = ranks.sent
    assert sent.numel() == 1 + len(found) + sum(each.numel() for each in found)


def test_a_weight_without_a_gradient_on_any_rank_has_none():
    model = randomized_model("llama")
    model.unused = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    training_step(model, BATCH, optimizer, Recorded(1, 2))
    assert model.unused.grad is None
    assert model.unused.tolist() == [1, 1, 1]


def test_shares_leave_out_batches_without_a_sample_of_this_rank():
    batches = [BATCH, {"input_ids": IDS[:2]}]
    found = [
        [len(each["input_ids"]) for each in own_shares(batches, Ranks(r, 3))] for r in range(3)
    ]
    assert found == [[1], [1, 1], [2, 1]]
    assert torch.equal(own_shares(batches, Ranks(2, 3))[0]["attention_mask"], MASK[2:])
    assert [each.keys() for each in own_shares(batches, SINGLE)] == [
        each.keys() for each in batches
    ]
