"""LLM Surgeon against least squares weighted by gradients."""

import pytest
import torch

import prunekit
from tests.support.rankers import TOKENS
from tests.support.units import randomized_model


def test_surgeon_weighs_what_a_refit_loses_by_the_gradients_of_the_loss():
    """The score is ½ tr(G D H Dᵀ), in float64.

    D is the weight change of the optimal refit.
    """
    model = randomized_model("llama")
    gates = prunekit.heads(model)
    site = gates.linear_groups[1]
    seen, given = [], []
    linear = site.reader.linear
    handles = [
        linear.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach())),
        linear.register_forward_hook(lambda _, x, y: given.append(y)),
    ]
    loss = model(TOKENS, labels=TOKENS).loss * TOKENS[:, 1:].numel()
    (gradient,) = torch.autograd.grad(loss, given)
    for handle in handles:
        handle.remove()
    found, mean = (
        gates.score("surgeon", TOKENS, damping=1e-9, full=full)[site.name] for full in (True, False)
    )
    x, g = seen[0].flatten(0, 1).double(), gradient.flatten(0, 1).double()
    minded = g.T @ g / TOKENS[:, 1:].numel()
    weight = linear.weight.detach().double()
    for unit in range(2):
        change = weight.clone()
        keep = site.owner != unit
        change[:, keep] -= torch.linalg.lstsq(x[:, keep], x @ weight.T).solution.T
        off = x @ change.T
        rise = (minded * (off.T @ off)).sum() / len(x) / 2
        assert float(found[unit]) == pytest.approx(float(rise), rel=2e-3)
        rise = minded.diagonal().mean() * off.square().sum() / len(x) / 2
        assert float(mean[unit]) == pytest.approx(float(rise), rel=2e-3)
