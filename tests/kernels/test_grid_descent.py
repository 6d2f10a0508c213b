import pytest
import torch
from prunekit_kernels import Grid, grid_descent, grid_scales, nearest, spread


def case(outputs=7, inputs=160):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    target = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    keep = torch.rand(outputs, inputs, generator=generator) > 0.5
    scale = spread(grid_scales(target, "int4", 32, torch.float64), inputs)
    grid = Grid(scale, "int4")
    return target, x.T @ x / 400, keep, grid, nearest(target * keep, scale, "int4")


def plainly(weight, target, gram, keep, *, grid, ridge, passes):
    """Do the same with the whole gradient of each column."""
    damped = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    for _ in range(passes):
        for j in range(weight.shape[1]):
            gradient = ((target - weight) @ damped)[:, j]
            wanted = weight[:, j] + gradient / damped[j, j]
            weight[:, j] = nearest(wanted, grid.scale[:, j], grid.kind) * keep[:, j]


def test_equals_columns_that_are_visited_plainly():
    target, gram, keep, grid, start = case()
    ours, expected = start.clone(), start.clone()
    grid_descent(ours, target, gram, keep, grid, 0.3, 2)
    plainly(expected, target, gram, keep, grid=grid, ridge=0.3, passes=2)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert not torch.equal(ours, start)


def test_errs_less_with_each_pass_and_keeps_zeros():
    target, gram, keep, grid, weight = case()
    losses = []
    for _ in range(3):
        losses.append(torch.trace((target - weight) @ gram @ (target - weight).T).item())
        grid_descent(weight, target, gram, keep, grid, 0.0, 1)
        assert not weight[~keep].any()
        assert torch.equal(nearest(weight, grid.scale, grid.kind), weight)
    assert losses[0] > 1.2 * losses[1] > 1.2 * losses[2]


@pytest.mark.parametrize("dead", [0, 129])
def test_a_dead_input_does_no_harm(dead):
    target, gram, keep, grid, weight = case()
    gram[dead], gram[:, dead] = 0, 0
    grid_descent(weight, target, gram, keep, grid, 0.0, 1)
    assert weight.isfinite().all()
