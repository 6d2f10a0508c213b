"""Magnitude keeps the largest weights."""

import torch

from prunekit.methods.layer import Layer
from prunekit.methods.magnitude import Magnitude
from prunekit.patterns import parse
from prunekit.statistics import StageStatistics


def test_magnitude_keeps_the_largest_and_needs_nothing():
    given = Layer("a", torch.tensor([[3.0, -1, 2, -4]]), StageStatistics([]), parse("2:4"), 0.5)
    assert Magnitude().prune(given).weight.tolist() == [[3, 0, 0, -4]]
    assert not Magnitude.needs
