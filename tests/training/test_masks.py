"""Masked training: pruned weights remain zero under any optimizer."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunekit.errors import ConfigError
from prunekit.training.masks import keep_masks
from tests.kernels.sparse import two_of_four

OPTIMIZERS = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1, amsgrad=True),
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Nesterov": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True),
    "Adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.1),
    "RMSprop": lambda weights: torch.optim.RMSprop(weights, lr=0.1, momentum=0.9, centered=True),
}


def pruned():
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), Conv1D(8, 12), nn.Linear(8, 3))
    model[0].weight.data = two_of_four(12, 16)
    model[2].weight.data = two_of_four(12, 8)
    return model


def step(model, optimizer, times=3):
    for _ in range(times):
        optimizer.zero_grad()
        model(torch.randn(5, 16)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("watched", [True, False], ids=["its optimizer", "any optimizer"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_zeros_stay_zero_and_the_rest_learns(make, watched):
    model = pruned()
    optimizer = make(model.parameters())
    step(model, optimizer, 1)  # optimizer moments from before pruning
    weights = [model[0].weight, model[2].weight]
    for weight, pattern in zip(weights, pruned()[:3:2], strict=True):
        weight.data *= pattern.weight != 0
    before = [weight.detach().clone() for weight in weights]
    with keep_masks(model, optimizer if watched else None) as masks:
        assert list(masks.weights) == ["0.weight", "2.weight"]
        step(model, optimizer)
    for weight, old in zip(weights, before, strict=True):
        gone = old == 0
        assert (weight[gone] == 0).all()
        assert (weight[~gone] != old[~gone]).any()
        state = [part for part in optimizer.state[weight].values() if part.shape == weight.shape]
        assert state
        assert all((part[gone] == 0).all() for part in state)


def states(model, optimizer):
    return [part for part in optimizer.state[model[0].weight].values() if part.ndim == 2]


def test_a_state_that_is_loaded_later_is_masked():
    model, dense = pruned(), pruned()
    optimizer, other = (torch.optim.AdamW(each.parameters()) for each in (model, dense))
    step(dense, other)
    with keep_masks(model):
        step(model, optimizer)
        optimizer.load_state_dict(other.state_dict())
        step(model, optimizer, 1)
    zeros = model[0].weight == 0
    assert all(
        (part[zeros] == 0).all() and (part[~zeros] != 0).any() for part in states(model, optimizer)
    )


def test_the_state_of_an_optimizer_that_mixes_weights_is_masked_each_step():
    class Mixing(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            for part in states(model, self):
                part.add_(part.sum())

    model = pruned()
    optimizer = Mixing(model.parameters())
    with keep_masks(model):
        step(model, optimizer)
    zeros = model[0].weight == 0
    assert all(
        (part[zeros] == 0).all() and (part[~zeros] != 0).any() for part in states(model, optimizer)
    )


def test_without_masks_zeros_come_back():
    model = pruned()
    zeros = (model[0].weight == 0).sum()
    keep_masks(model).remove()
    step(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    assert (model[0].weight == 0).sum() < zeros


def test_gradients_are_zero_where_weights_are():
    model = pruned()
    with keep_masks(model):
        model(torch.randn(5, 16)).sum().backward()
    assert (model[0].weight.grad[model[0].weight == 0] == 0).all()


def test_weights_changed_by_hand_are_masked_when_asked():
    model = pruned()
    zeros = model[0].weight == 0
    with keep_masks(model) as masks:
        model[0].weight.data += 1
        masks.apply()
    assert torch.equal(model[0].weight == 0, zeros)


def test_a_dense_model_is_refused():
    with pytest.raises(ConfigError, match=r"no linear layer of Linear has zeros\. Prune it first"):
        keep_masks(nn.Linear(4, 4))


def replaced(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("other", [copy.deepcopy, replaced, pickled])
def test_training_other_weights_than_the_masked_ones_is_refused(other):
    model = pruned()
    masks = keep_masks(model)
    model = other(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with torch.no_grad():
        model(torch.randn(5, 16))
    with pytest.raises(ConfigError, match=r"0.weight is not the masked weight: .* Call keep_masks"):
        step(model, optimizer)
    zeros = [module.weight == 0 for module in model[:3:2]]
    with keep_masks(model):
        step(model, optimizer)
    assert all(
        (each.weight[gone] == 0).all() for each, gone in zip(model[:3:2], zeros, strict=True)
    )
    masks.remove()
    step(model, optimizer)


def test_a_copy_of_a_model_without_masks_is_free():
    model = pruned()
    masks = keep_masks(model)
    other = copy.deepcopy(model)
    masks.remove()
    step(other, torch.optim.SGD(other.parameters(), lr=0.1))


def test_only_a_model_has_masks():
    with pytest.raises(ConfigError, match="a str is not a model"):
        keep_masks("model")
