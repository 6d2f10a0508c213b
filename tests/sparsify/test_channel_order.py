"""Channel orders for n:m: near the optimum, never worse than before."""

import itertools

import pytest
import torch

from prunekit.patterns import parse
from prunekit.sparsify.channel_order import find_channel_order, kept_saliency


@pytest.mark.parametrize("spelled", ["2:4", "1:4", "3:4"])
def test_finds_the_best_of_all_orders_of_two_groups(spelled):
    pattern = parse(spelled)
    splits = [
        torch.tensor([[0, *rest], [i for i in range(1, 8) if i not in rest]])
        for rest in itertools.combinations(range(1, 8), 3)
    ]
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        saliency = torch.rand(16, 8, generator=generator).square()
        chosen = find_channel_order(saliency, pattern)
        assert sorted(chosen.tolist()) == [*range(8)]
        values = [float(kept_saliency(saliency, groups, pattern.n)) for groups in splits]
        share = float(kept_saliency(saliency, chosen.view(2, 4), pattern.n)) - values[0]
        found.append(share / (max(values) - values[0] + 1e-12))
        assert share >= 0
    assert sum(value > 0.999 for value in found) >= 8
    assert sorted(found)[10] > 0.95


def test_is_an_order_though_groups_differ_by_powers_of_ten():
    """A pair exchanges only if the gain is relevant to both groups."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        spread = 3 * torch.randn(64, 64, generator=generator)
        spread += 8 * torch.randn(1, 64, generator=generator)
        assert sorted(find_channel_order(spread.exp(), parse("2:4")).tolist()) == [*range(64)]


def test_puts_large_channels_apart():
    saliency = torch.ones(8, 16)
    saliency[:, :8] = 100
    groups = find_channel_order(saliency, parse("2:4")).view(4, 4)
    assert (groups < 8).sum(1).tolist() == [2, 2, 2, 2]


def test_an_order_that_cannot_be_bettered_stays():
    saliency = torch.ones(8, 16)
    assert find_channel_order(saliency, parse("2:4")).tolist() == [*range(16)]
