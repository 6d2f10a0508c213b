"""The router of a layer of experts, and the choice among groups."""

import pytest
import torch
from torch import nn

from prunekit.errors import ShapeError
from prunekit.models.units.experts import expert_groups
from prunekit.models.units.routers import Router, RouterAxis
from tests.support.architectures import tiny

GROUPED = Router(nn.Module(), (), (), top_k=4, groups=2, top_groups=1)


def test_bias_and_buffers_of_a_router_belong_to_it():
    (group,) = expert_groups(tiny("deepseek_v3"))
    assert [(axis.name, axis.is_parameter) for axis in group.router.axes] == [
        ("weight", True),
        ("e_score_correction_bias", False),
    ]
    assert (group.router.top_k, group.router.groups) == (2, 1)
    assert group.module not in [module for module, _ in group.router.counters]


def test_a_parameter_can_be_replaced_by_a_tensor_for_a_while():
    linear = nn.Linear(2, 3, bias=False)
    axis, before = RouterAxis(linear, "weight", 0), linear.weight
    axis.set(linear.weight[:2])
    assert linear(torch.ones(1, 2)).shape == (1, 2)
    axis.set(before)
    assert linear.weight is before


@pytest.mark.parametrize("left", [6, 7])
def test_groups_keep_as_many_as_a_token_takes_of_the_chosen_ones(left):
    with pytest.raises(ShapeError, match="a multiple of 2 and at least 8"):
        GROUPED.check_left("experts", left)
    GROUPED.check_left("experts", 8)


def test_the_lowest_scores_are_spread_over_the_groups():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0, 7.0, 6.0, 5.0])
    keep = torch.tensor([False, *[True] * 7])
    assert GROUPED.balanced(scores, keep).tolist() == [-3, -2, -1, 0, 0, -1, -2, -3]
    plain = Router(nn.Module(), (), (), top_k=2)
    assert plain.balanced(scores, keep) is scores
