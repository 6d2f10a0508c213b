"""Salience against its formula on observed inputs and gradients."""

import pytest
import torch

import prunekit
from prunekit.structured.batches import losses
from prunekit.structured.rankers.salience import Salience, token_windows
from tests.support.rankers import TOKENS, flat
from tests.support.units import batch, randomized_model

SAMPLES, LENGTH = TOKENS.shape


@pytest.fixture(scope="module")
def gates():
    model = randomized_model("llama")
    model.requires_grad_(requires_grad=False)
    return prunekit.neurons(model)


def batches(*sizes):
    return [{"input_ids": part} for part in TOKENS.split(sizes)]


def sums_of(gates, tokens):
    """Return Σ|h| and Σ|∂L/∂h| of the second feed-forward in float64, L the mean loss."""
    seen, reader = [], gates.linear_groups[1].reader.linear
    handle = reader.register_forward_pre_hook(
        lambda _, x: seen.append(x[0].detach().requires_grad_()) or (seen[-1],)
    )
    loss, predictions = losses(gates.model, {"input_ids": tokens})
    (gradient,) = torch.autograd.grad(loss.sum() / predictions.sum(), seen)
    handle.remove()
    return (each.detach().abs().double().sum((0, 1)) for each in (seen[0], gradient))


def second(gates, given, **settings):
    return gates.score("salience", given, **settings)[gates.linear_groups[1].name]


def test_a_window_is_the_product_of_two_sums_and_the_root_of_a_kurtosis(gates):
    """The score is (Σ|h|)(Σ|g|) + √Kurt, not Σ|h g|.

    Kurt is the excess kurtosis of a neuron's weights, clamped at 0. Σ|h| is that of a full window.
    """
    h, g = sums_of(gates, TOKENS)
    weight = gates.linear_groups[1].reader.linear.weight.double()
    z = (weight - weight.mean(0)) / weight.std(0)
    kurtosis = (z**4).mean(0) - 3
    product = h * 4096 / TOKENS.numel() * g
    found = second(gates, batches(5, 5))
    torch.testing.assert_close(found, product + kurtosis.clamp_min(0).sqrt(), rtol=1e-5, atol=0)
    found = second(gates, batches(5, 5), outliers=False)
    torch.testing.assert_close(found, product, rtol=1e-5, atol=0)


@pytest.mark.parametrize("smoothing", [0, 0.85])
def test_windows_are_averaged(gates, smoothing):
    """Windows of 4, 4 and 2 samples, each with the mean loss of its own."""
    size = 4 * LENGTH
    parts = [
        h * size / tokens.numel() * g
        for tokens in TOKENS.split(4)
        for h, g in [sums_of(gates, tokens)]
    ]
    weights = [0.4, 0.4, 0.2] if not smoothing else [0.85**2, 0.15 * 0.85, 0.15]
    expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    found = second(gates, batches(3, 7), window=size, smoothing=smoothing, outliers=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("window", [4096, 3 * LENGTH])
@pytest.mark.parametrize("cuts", [[1] * SAMPLES, [9, 1], [2, 5, 3]], ids=str)
def test_scores_do_not_depend_on_the_cut_into_batches(gates, cuts, window):
    whole = gates.score("salience", batches(SAMPLES), window=window)
    cut = gates.score("salience", batches(*cuts), window=window)
    torch.testing.assert_close(flat(cut), flat(whole), rtol=1e-5, atol=0)


def test_padding_counts_neither_as_tokens_nor_as_samples_cut_elsewhere(gates):
    given = batch(gates.model)
    rows = [
        {name: value[row : row + 1] for name, value in given.items()}
        for row in range(len(given["input_ids"]))
    ]
    torch.testing.assert_close(
        flat(gates.score("salience", rows)),
        flat(gates.score("salience", [given])),
        rtol=1e-5,
        atol=0,
    )


def test_the_share_of_the_kurtosis_does_not_vanish_with_the_number_of_samples(gates):
    tokens = torch.randint(3, 96, (256, LENGTH), generator=torch.Generator().manual_seed(0))
    shares = []
    for count in (16, 256):
        with_it, without = (
            flat(gates.score("salience", tokens[:count], window=8 * LENGTH, outliers=outliers))
            for outliers in (True, False)
        )
        shares.append(float((with_it - without).sum() / with_it.sum()))
    assert shares[1] == pytest.approx(shares[0], rel=0.1)
    assert shares[0] > 0


def test_a_window_ends_with_the_sample_that_fills_it_and_takes_in_a_short_last_one():
    assert token_windows([3, 3, 3, 3, 3], 6) == [0, 0, 1, 1, 2]
    assert token_windows([3, 3, 3, 3, 2], 6) == [0, 0, 1, 1, 1]
    assert token_windows([9, 1], 6) == [0, 0]
    assert token_windows([1], 6) == [0]


def test_weights_of_windows_sum_to_one():
    for smoothing in (0, 0.85):
        weights = Salience(smoothing=smoothing).window_weights([7, 7, 7, 5])
        assert sum(weights) == pytest.approx(1)
