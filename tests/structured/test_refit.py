"""Refit of reading linears: least squares, and damping."""

import pytest
import torch

import prunekit
from prunekit.errors import NumericsError
from prunekit.models.units.heads_neurons import linear_groups
from prunekit.structured.refit import damped_factor, mean_square, refit
from tests.support.rankers import TOKENS, flat
from tests.support.units import randomized_model


def test_a_refit_gives_the_least_squares_weights_of_the_kept_units():
    model = randomized_model("llama")
    site = linear_groups(model, "heads")[0]
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).double()
    x[:, :16] += x[:, 16:]
    weight = site.reader.linear.weight.detach().double().clone()
    refit(site, x.T @ x / 200, [1], damping=1e-12)
    fit = torch.linalg.lstsq(x[:, 16:], x @ weight.T).solution.T
    torch.testing.assert_close(
        site.reader.linear.weight[:, 16:].double(), fit, rtol=1e-4, atol=1e-5
    )


def factor_of(diagonal):
    total = torch.diag(torch.tensor(diagonal)).double()
    return damped_factor(total.clone, mean_square(total), 1e-9, "a")


def test_what_rounding_left_indefinite_is_damped_further():
    factor, damping = factor_of([1, -1e-6])
    assert damping == pytest.approx(1e-5)
    torch.testing.assert_close(
        (factor @ factor.T).diagonal(), torch.tensor([1, 4e-6]).double(), rtol=1e-5, atol=0
    )
    with pytest.raises(NumericsError, match=r"^a: the products .* not positive definite, even"):
        factor_of([3.0, -2.0])
    gates = prunekit.neurons(randomized_model("llama"))
    assert flat(gates.score("obs", TOKENS[:1, :6], damping=1e-12)).isfinite().all()
