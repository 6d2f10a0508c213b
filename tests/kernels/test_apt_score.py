import pytest
import torch
from prunekit_kernels import apt_score, salience
from prunekit_kernels.apt_score import weight_moments
from prunekit_kernels.salience import new_state

TOKENS, COLUMNS, OUTPUTS = 60, 12, 40


def gathered(calls=3, device="cpu"):
    generator = torch.Generator().manual_seed(calls)
    h = torch.randn(calls, TOKENS, COLUMNS, generator=generator).to(device) + 0.5
    g = torch.randn(calls, TOKENS, COLUMNS, generator=generator).to(device)
    state = new_state(COLUMNS, device)
    for one, gradient in zip(h, g, strict=True):
        salience(one, gradient, state)
    return h.double(), g.double(), state


def weights(device="cpu"):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(OUTPUTS, COLUMNS, generator=generator).to(device) ** 3


def released_kurtosis(o, dim):
    """Return the released code's excess kurtosis, by the unbiased deviation."""
    z = (o - o.mean(dim, keepdim=True)) / o.std(dim, keepdim=True)
    return (z**4).mean(dim) - 3


@pytest.mark.parametrize("width", [1, 4])
def test_equals_the_released_formulas(width, device):
    h, g, state = gathered(device=device)
    weight = weights(device)
    o = weight.double() * h.mean((0, 1))
    o = o.unflatten(1, (-1, width)).transpose(1, 2).flatten(0, 0)
    o = o.permute(2, 0, 1).flatten(1)
    products = (h.abs().sum(1) * g.abs().sum(1)).sum(0).unflatten(0, (-1, width)).sum(1)
    exact = products + released_kurtosis(o, 1).clamp_min(0).sqrt()
    found = apt_score(state, weight_moments(weight), width=width)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_equals_the_paper(device):
    h, g, state = gathered(device=device)
    h, g = h.flatten(0, 1), g.flatten(0, 1)
    d = h - h.mean(0)
    kurtosis = (d**4).mean(0) / (d**2).mean(0) ** 2
    exact = h.abs().sum(0) * g.abs().sum(0) + kurtosis.sqrt()
    found = apt_score(state, None, product="sums", excess=False)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_products_by_element(device):
    h, g, state = gathered(device=device)
    found = apt_score(state, None, product="elements", excess=False)
    kurtosis = apt_score(state, None, product="sums", excess=False) - state[5] * state[6]
    exact = (h * g).abs().sum((0, 1))
    torch.testing.assert_close(found - kurtosis, exact, rtol=1e-5, atol=1e-4)


def test_a_negative_excess_is_clamped_or_refused():
    state = new_state(2)
    salience(torch.tensor([[1.0, 1], [-1, -1], [1, 1], [-1, -1]]), torch.ones(4, 2), state)
    assert apt_score(state, None).tolist() == [16, 16]
    with pytest.raises(ValueError, match="excess kurtosis is negative"):
        apt_score(state, None, clamp=False)


def test_constant_columns_have_no_kurtosis():
    state = new_state(2)
    salience(torch.ones(4, 2), torch.ones(4, 2), state)
    assert apt_score(state, None, excess=False).tolist() == [16, 16]


def test_refuses_widths_that_do_not_fit():
    with pytest.raises(ValueError, match="12 columns are not units of 5"):
        apt_score(new_state(12), None, width=5)
