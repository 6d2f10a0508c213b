import pytest
import torch
from prunekit_kernels import codes, grid_scales, nearest, spread

WEIGHT = torch.randn(6, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_values_are_multiples_of_scales_that_the_stored_type_holds(kind):
    weight = WEIGHT.float()
    scale = grid_scales(weight, kind, 32, torch.bfloat16)
    assert torch.equal(scale, scale.bfloat16().float())
    wide = spread(scale, 64)
    found = nearest(weight, wide, kind)
    assert torch.equal(found, codes(weight, wide, kind).float() * wide)
    assert torch.equal(nearest(found, wide, kind), found)
    # What is stored in 16 bits has the same codes again.
    assert torch.equal(codes(found.bfloat16().float(), wide, kind), codes(weight, wide, kind))


def test_the_largest_of_int8_and_fp8_is_reached():
    for kind, largest in (("int8", 127), ("fp8", 448)):
        scale = spread(grid_scales(WEIGHT, kind, 64, torch.float64), 64)
        found = codes(WEIGHT, scale, kind).double().abs().amax(1)
        assert torch.equal(found, torch.full((6,), largest, dtype=torch.float64))


def test_scales_of_int4_are_searched_by_the_energy_of_inputs():
    weight, energy = WEIGHT[:, :32].clone(), torch.ones(32)
    weight[:, 0], energy[0] = 9, 0  # an outlier whose input is always 0
    plain = grid_scales(weight, "int4", 32, torch.float64)
    weighed = grid_scales(weight, "int4", 32, torch.float64, energy)
    assert (weighed < plain).all()

    def lost(scale):
        return ((nearest(weight, scale, "int4") - weight) ** 2)[:, 1:].sum()

    assert lost(weighed) < lost(plain) < lost(plain / plain * 9 / 7 + 1e-9)


def test_zeros_stay_zeros_and_halves_are_even():
    found = codes(torch.tensor([0.0, -0.0, 0.5, 1.5, -9]), torch.ones(5), "int4")
    assert found.tolist() == [0, 0, 0, 2, -8]
    scale = grid_scales(torch.zeros(2, 32), "int4", 32, torch.bfloat16)
    assert torch.equal(scale, torch.ones(2, 1))


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="64 inputs are not groups of 48"):
        grid_scales(WEIGHT, "int4", 48, torch.bfloat16)
