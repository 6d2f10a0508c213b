"""Agreement of rankings, and similarity between units."""

import pytest
import torch

import prunekit
from prunekit.structured.agreement import spearman
from tests.support.rankers import TOKENS
from tests.support.units import randomized_model


def test_spearman_is_that_of_the_textbook():
    """1 − 6 Σ d² / (n (n² − 1)) without ties."""
    a = {"x": torch.tensor([3.0, 1, 4]), "y": torch.tensor([1.5, 9])}
    b = {"x": torch.tensor([10.0, 20, 50]), "y": torch.tensor([30.0, 40])}
    d2 = (3 - 1) ** 2 + (1 - 2) ** 2 + (4 - 5) ** 2 + (2 - 3) ** 2 + (5 - 4) ** 2
    assert spearman(a, b) == pytest.approx(1 - 6 * d2 / (5 * 24))
    assert spearman(a, a) == pytest.approx(1)
    assert spearman(a, {name: -score for name, score in a.items()}) == pytest.approx(-1)
    assert spearman(a, {name: 0 * score for name, score in a.items()}) == 0


def test_heads_that_give_the_same_are_redundant_and_others_less():
    model = randomized_model("gpt2")
    inner = model.transformer.h[0].attn.c_attn
    with torch.no_grad():
        for third in (0, 32, 64):
            inner.weight[:, third + 8 : third + 16] = inner.weight[:, third : third + 8]
            inner.bias[third + 8 : third + 16] = inner.bias[third : third + 8]
    found = prunekit.heads(model).redundancy(TOKENS)["transformer.h.0.attn"]
    torch.testing.assert_close(found.diagonal(), torch.ones(4).double())
    torch.testing.assert_close(found, found.T)
    assert found[0, 1] == pytest.approx(1)
    assert found[0, 2:].max() < 0.95
    assert found.min() >= 0
