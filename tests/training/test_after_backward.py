"""Gradients are masked once a backward ends, whatever runs within it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from prunekit.training.masks import keep_masks
from tests.training.test_masks import pruned


def gone(model):
    return {weight: weight == 0 for weight in (model[0].weight, model[2].weight)}


def all_masked(model):
    return all((weight.grad[zeros] == 0).all() for weight, zeros in gone(model).items())


def test_an_optimizer_that_steps_within_the_backward_sees_masked_gradients():
    model = pruned()
    zeros = gone(model)
    optimizers = {each: torch.optim.AdamW([each], lr=0.1) for each in model.parameters()}
    with keep_masks(model):
        for weight, optimizer in optimizers.items():
            weight.register_post_accumulate_grad_hook(
                lambda _, optimizer=optimizer: optimizer.step()
            )
        for _ in range(3):
            model(torch.randn(5, 16)).square().sum().backward()
            model.zero_grad()
    for weight, pruned_ones in zeros.items():
        moments = [each for each in optimizers[weight].state[weight].values() if each.ndim == 2]
        assert all((each[pruned_ones] == 0).all() for each in (weight, *moments))
        assert all((each[~pruned_ones] != 0).any() for each in moments)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        raise RuntimeError("lost")


def test_a_backward_that_fails_leaves_the_next_one_masked():
    model = pruned()
    with keep_masks(model):
        x = torch.randn(5, 16, requires_grad=True)
        with pytest.raises(RuntimeError, match="lost"):
            model(Fails.apply(x)).square().sum().backward()
        model(x).square().sum().backward()  # adds to the gradients of the lost one
    assert all_masked(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_within_a_backward(reentrant):
    model = pruned()
    with keep_masks(model):
        x = torch.randn(5, 16, requires_grad=True)
        first = checkpoint(nn.Sequential(*model[:2]), x, use_reentrant=reentrant)
        model[2:](first).square().sum().backward()
        assert all_masked(model)


def test_gradients_taken_away_within_the_backward():
    model = pruned()
    with keep_masks(model):
        x = torch.randn(5, 16, requires_grad=True)

        def take(_):
            model[2].weight.grad = None

        x.register_hook(take)
        model(x).square().sum().backward()
    assert model[2].weight.grad is None
    assert (model[0].weight.grad[model[0].weight == 0] == 0).all()


def test_a_later_hook_of_a_gradient_sees_it_masked():
    model, seen = pruned(), []
    with keep_masks(model):
        weight = model[0].weight
        weight.register_post_accumulate_grad_hook(
            lambda each: seen.append(bool((each.grad[each == 0] == 0).all()))
        )
        model(torch.randn(5, 16)).square().sum().backward()
    assert seen == [True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_backward():
    model = pruned()
    compiled = torch.compile(backend="eager")
    with keep_masks(model), torch._dynamo.compiled_autograd._enable(compiled):
        model(torch.randn(5, 16)).square().sum().backward()
    assert all_masked(model)
