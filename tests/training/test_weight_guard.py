"""Guards of masked weights: a weight that takes the place of another is noticed."""

import copy

import pytest
import torch
from torch import nn

from prunekit.errors import ConfigError
from prunekit.training.weight_guard import MaskedWeight, WeightGuard, attach, is_masked


def guarded():
    linear = nn.Linear(3, 2)
    place = MaskedWeight(linear, "weight")
    guard = WeightGuard("name", place)
    attach(guard, place)
    return linear, place, guard


def test_another_weight_is_noticed_in_training_alone():
    linear, place, guard = guarded()
    linear(torch.ones(1, 3))
    assert is_masked(place)
    linear.weight = nn.Parameter(torch.ones(2, 3))
    assert not is_masked(place)
    with torch.no_grad():
        linear(torch.ones(1, 3))
    with pytest.raises(ConfigError, match="name is not the masked weight"):
        linear(torch.ones(1, 3))
    guard.active = False
    linear(torch.ones(1, 3))


def test_a_guard_of_a_copy_takes_the_place_of_the_copied_one():
    copied = copy.deepcopy(guarded()[0])
    with pytest.raises(ConfigError, match="is not the masked weight"):
        copied(torch.ones(1, 3))
    place = MaskedWeight(copied, "weight")
    attach(WeightGuard("name", place), place)
    copied(torch.ones(1, 3))
    assert len(copied._forward_pre_hooks) == 1
