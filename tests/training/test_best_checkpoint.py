"""The weights with the lowest loss come back."""

import torch

from prunekit.training.best_checkpoint import BestCheckpoint


def test_the_first_weights_with_the_lowest_loss_are_restored():
    weight = torch.zeros(2, requires_grad=True)
    best, stale = BestCheckpoint(lambda: [weight]), []
    for number, loss in enumerate([3.0, 2.0, 2.0, 4.0]):
        weight.data.fill_(number)
        best.update(loss)
        stale.append(best.stale)
    assert (stale, best.loss) == ([0, 0, 1, 2], 2.0)
    best.restore()
    assert weight.tolist() == [1, 1]
    assert weight.requires_grad


def test_a_first_loss_that_is_no_number_is_stored_too():
    weight = torch.zeros(1)
    best = BestCheckpoint(lambda: [weight])
    best.update(float("nan"))
    weight.fill_(5)
    best.restore()
    assert weight.tolist() == [0]
