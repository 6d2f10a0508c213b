"""ALPS: the penalty follows the changes of the mask."""

import prunekit_kernels
import pytest
import torch

from prunekit.methods.alps import Alps, Penalties
from prunekit.methods.projection import Projection
from tests.support.methods import layer


def test_the_penalty_of_alps_follows_how_much_the_mask_changes():
    keep = torch.arange(1000).view(1, -1) < 500
    project = Projection([], [prunekit_kernels.pack(keep)])
    found = Penalties(Alps(), layer(), project)
    penalties = iter(found)
    shifts = [100, 4, 1]  # of 500 that stay, twice so many change: 40 %, 1.6 %, 0.4 %
    seen = []
    for shift in shifts:
        seen.append([next(penalties) for _ in range(3)])
        keep = keep.roll(shift, 1)
        project.bits = [prunekit_kernels.pack(keep)]
    seen.append([next(penalties)])
    assert found.upcoming(seen[-1][0], 3) == pytest.approx([0.1716, 0.1716 * 1.1, 0.1716 * 1.21])
    assert [steps[0] for steps in seen] == pytest.approx([0.1, 0.13, 0.156, 0.1716])
    assert all(len(set(steps)) == 1 for steps in seen)


def test_alps_looks_no_further_ahead_than_its_last_step():
    found = Penalties(Alps(most_iterations=4), layer(), Projection([], []))
    assert found.upcoming(0.1, 8) == [0.1, 0.1 * 1.3]


def test_alps_ends_when_the_mask_has_settled():
    project = Projection([], [torch.full((2, 1), 255, dtype=torch.uint8)])
    assert list(Penalties(Alps(), layer(), project)) == [0.1] * 3
