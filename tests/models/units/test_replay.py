"""A removal replayed on stored tensors gives those of the smaller model."""

from functools import partial

import pytest
import torch
from torch import nn

from prunekit.models.units.narrowing import change_values, narrow_parameter, recorded_steps
from prunekit.models.units.replay import Replay, replays, unless_equal

DOUBLE = torch.float64


@pytest.fixture
def cut():
    """Tensors before and after a removal, and its steps."""
    whole = nn.Parameter(torch.rand(4, 6))
    before = {"moved.1": whole, "same": nn.Parameter(torch.rand(2)), "computed": torch.tensor(32.0)}
    with recorded_steps() as steps:
        rows = narrow_parameter(whole, 0, torch.tensor([0, 3]))
        change_values(rows, partial(torch.Tensor.mul_, other=3))
        both = narrow_parameter(rows, 1, torch.tensor([2, 5]))
    after = {"moved.0": both, "same": before["same"], "computed": torch.tensor(24.0)}
    return before, after, replays(before, after, steps, DOUBLE)


def test_rows_columns_and_values(cut):
    before, _, found = cut
    stored = before["moved.1"].detach().half()
    value = found["moved.0"].of(stored)
    assert value.dtype == DOUBLE
    assert torch.equal(value, stored.double()[[0, 3]][:, [2, 5]] * 3)
    assert stored.dtype == torch.float16


def test_tensors_that_nothing_changes_are_the_stored_ones(cut):
    found, whole = cut[2], torch.rand(2)
    assert found["same"].is_trivial
    assert found["same"].of(whole) is whole


def test_a_buffer_that_follows_from_the_config_is_computed_anew(cut):
    _, after, found = cut
    assert not found["computed"].is_trivial
    assert found["computed"].of(torch.tensor(32.0)) is after["computed"]


def test_a_part_of_two_axes_is_put_back():
    weight = nn.Parameter(torch.rand(4, 6))
    with recorded_steps() as steps:
        narrow_parameter(narrow_parameter(weight, 0, torch.tensor([1])), 1, torch.tensor([2, 4]))
    back = Replay(tuple(steps), DOUBLE).put_back(torch.tensor([[7.0, 8.0]]))
    assert back.shape == (4, 6)
    assert back[1].tolist() == [0, 0, 7, 0, 8, 0]
    assert back.sum() == 15


def test_a_factor_of_one_rounds_nothing():
    weight, wide = nn.Parameter(torch.rand(3)), torch.rand(3, dtype=DOUBLE)
    with recorded_steps() as steps:
        change_values(weight, partial(torch.Tensor.mul_, other=1))
    assert Replay(tuple(steps), torch.float32).of(wide) is wide


def test_a_value_that_is_only_rounded_is_the_stored_one():
    stored = torch.tensor([1 + 2**-20], dtype=DOUBLE)
    assert unless_equal(stored, torch.ones(1), torch.bfloat16) is stored
    other = torch.tensor([2.0])
    assert unless_equal(stored, other, torch.bfloat16) is other
