"""OBS sweep that rounds what it keeps: the papers' loop in float64."""

import pytest
import torch
from prunekit_kernels import Grid, NOfM, grid_scales, inverse_factor, nearest, obs_sweep, spread


def layer(outputs, inputs, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 * outputs + inputs)
    x = torch.randn(2 * inputs + 9, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    upper = inverse_factor((x.T @ x).float().to(device), 0.01).upper
    return weight.to(device, dtype), upper.to(dtype)


def rounded_plainly(weight, upper, keep, grid):
    """Sweep column by column in float64: GPTQ with a mask, as the papers write it."""
    weight, done = weight.clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        rounded = nearest(weight[:, j], grid.scale[:, j], grid.kind)
        done[:, j] = torch.where(keep[:, j], rounded, 0)
        error = (weight[:, j] - done[:, j]) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
    return done


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("shape", [(9, 328), (24, 256), (5, 8)], ids=str)
def test_a_sweep_that_rounds_equals_the_papers(kind, shape, device):
    weight, upper = layer(*shape, device=device)
    keep = torch.rand(shape, device=device) > 0.5
    grid = Grid(spread(grid_scales(weight, kind, 8, torch.float64), shape[1]), kind)
    ours = weight.clone()
    kept = obs_sweep(ours, upper, keep, grid=grid)
    assert torch.equal(kept, keep)
    expected = rounded_plainly(weight, upper, keep, grid)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert not ours[~keep].any()


def test_n_of_m_is_selected_and_rounded_in_one_sweep(device):
    weight, upper = layer(16, 128, device=device)
    grid = Grid(spread(grid_scales(weight, "int4", 32, torch.float64), 128), "int4")
    joint = weight.clone()
    keep = obs_sweep(joint, upper, NOfM(2, 4), grid=grid)
    assert (keep.unflatten(1, (-1, 4)).sum(2) == 2).all()
    expected = rounded_plainly(weight, upper, keep, grid)
    torch.testing.assert_close(joint, expected, rtol=0, atol=1e-12)


def test_rounding_a_pruned_weight_is_rounding_while_pruning_by_its_mask(device):
    weight, upper = layer(16, 128, device=device)
    grid = Grid(spread(grid_scales(weight, "int4", 32, torch.float64), 128), "int4")
    pruned, joint = weight.clone(), weight.clone()
    keep = obs_sweep(pruned, upper, NOfM(2, 4))
    obs_sweep(pruned, upper, keep, grid=grid)
    obs_sweep(joint, upper, keep, grid=grid)
    torch.testing.assert_close(pruned, joint, rtol=0, atol=1e-12)


def test_scales_of_another_shape_are_refused():
    weight, upper = layer(4, 8)
    with pytest.raises(ValueError, match="scale must be"):
        obs_sweep(weight, upper, NOfM(2, 4), grid=Grid(torch.ones(4, 2), "int4"))
