"""A module with cached output: its observed traits, and when it runs."""

import pytest
import torch
from torch import nn

from prunekit.models.sequential.cached_module import CachedModule, ModuleTraits


class Part(nn.Module):
    """A linear followed by a given function."""

    def __init__(self, after):
        super().__init__()
        self.linear, self.after, self.runs = nn.Linear(4, 4), after, 0

    def forward(self, x):
        self.runs += 1
        return self.after(self.linear(x))


X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
TRAITS = {
    "its linear": (lambda y: y, ModuleTraits(None, plain=True, ends_with_linear=True)),
    "a tuple": (lambda y: (y, None), ModuleTraits(2, plain=True, ends_with_linear=True)),
    "a product": (lambda y: 2 * y, ModuleTraits(None, plain=True)),
    "two tensors": (lambda y: (y, y.sum()), ModuleTraits(2, plain=False)),
    "another shape": (lambda y: y[0], ModuleTraits(None, plain=False)),
}


@pytest.mark.parametrize("name", TRAITS)
@torch.no_grad()
def test_observes_the_form_of_its_output(name):
    after, expected = TRAITS[name]
    part, traits = Part(after), ModuleTraits()
    with CachedModule(part, part.linear, list, traits).observed(0, X):
        part(X)
    assert traits == expected


@torch.no_grad()
def test_a_settled_module_runs_its_last_linear_once_and_then_nothing():
    part, traits = Part(lambda y: (y, None)), ModuleTraits()
    cached = CachedModule(part, part.linear, list, traits)
    with cached.observed(0, X):
        part(X)
    with cached.before_last_stage(1, X):
        part(X)
    part.linear.weight.mul_(0.5)  # stands for pruning
    expected, runs, calls = part.linear(X), part.runs, []
    part.linear.register_forward_hook(lambda *_: calls.append(0))
    for _ in range(3):
        with cached.settled(1, X):
            output, rest = part(torch.zeros_like(X))
        assert torch.equal(output, expected)
        assert rest is None
    assert (part.runs, len(calls)) == (runs, 1)
    assert "forward" not in vars(part)


@pytest.mark.parametrize(("scale", "adds"), [(1, True), (0.5, False)])
@torch.no_grad()
def test_only_a_plain_sum_counts_as_a_residual_add(scale, adds):
    part, last, traits = Part(lambda y: y), nn.Linear(4, 4), ModuleTraits()
    cached = CachedModule(part, part.linear, list, traits)

    def run(x):
        total = x + scale * part(x)
        return [(part.linear, x), (last, total), (None, last(total))]

    with cached.observed(0, X):
        expected = run(X)
    cached.verify_residual_add(X, expected, run)
    assert traits.adds == adds


@torch.no_grad()
def test_folding_adds_the_output_to_the_hidden_states():
    part, traits = Part(lambda y: y), ModuleTraits(ends_with_linear=True, adds=True)
    cached, hidden = CachedModule(part, part.linear, list, traits), [X.clone(), 2 * X]
    cached.fold_into_hidden(hidden)  # no cached inputs yet
    assert torch.equal(hidden[0], X)
    expected = [x + part.linear(x) for x in hidden]
    for batch, x in enumerate(hidden):
        with cached.before_last_stage(batch, x):
            part(x)
    cached.fold_into_hidden(hidden)
    assert all(map(torch.equal, hidden, expected))
    with cached.settled(0, X):
        assert not part(X).any()
