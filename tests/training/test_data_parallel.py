"""A batch is shared by ranks, of which some may have no sample."""

import pytest
import torch

from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import NumericsError
from prunekit.structured.batches import mean_loss
from prunekit.structured.token_ids import IGNORED
from prunekit.training.data_parallel import (
    Losses,
    StepLosses,
    equal_shares,
    fine_tuning_loss,
    own_shares,
    training_step,
)
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


@pytest.mark.parametrize("size", [1, 2, 6])
def test_further_losses_of_an_objective_are_summed_too(size):
    """They are 0 on a rank without samples; the whole batch is the same on all."""
    seen = []

    def objective(model, share):
        loss = fine_tuning_loss(model, share).loss
        seen.append((len(share.whole["input_ids"]), int(share.predictions), share.counts))
        return Losses(2 * loss, loss, {"double": 2 * loss})

    found = []
    for rank in range(size):
        model = randomized_model("llama")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        ranks = Recorded(rank, size)
        found.append(training_step(model, BATCH, optimizer, ranks, objective))
    loss, _ = gradients(SINGLE)
    assert sum(each.loss for each in found) == pytest.approx(loss, rel=1e-6)
    assert sum(each.parts["double"] for each in found) == pytest.approx(2 * loss, rel=1e-6)
    assert {(whole, predictions) for whole, predictions, _ in seen} == {(4, 13)}
    assert sum(counts for *_, counts in seen) == min(size, 4)


def test_a_loss_that_is_not_finite_is_named():
    StepLosses(1.0, {"layer": 2.0}).check_finite(3)
    with pytest.raises(
        NumericsError, match=r"^train: the loss is inf at step 3\. Lower train\.rate"
    ):
        StepLosses(float("inf"), {"layer": 1.0}).check_finite(3)
    with pytest.raises(NumericsError, match=r"^apt: the layer loss is nan at step 4\. Lower apt"):
        StepLosses(1.0, {"layer": float("nan")}).check_finite(4, "apt")


def test_a_rank_without_samples_runs_one_that_predicts_nothing():
    batches = [BATCH, {"input_ids": IDS[:2]}]
    first, second = equal_shares(batches, Ranks(0, 3))
    assert [*first] == [*own_shares(batches, Ranks(0, 3))[0]]
    assert len(second["input_ids"]) == 1
    assert bool((second["labels"] == IGNORED).all())
    assert mean_loss(randomized_model("llama"), [second]) == 0


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
