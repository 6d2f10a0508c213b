from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekit_kernels._triton import runs_triton
from prunekit_kernels.packed_mask import unpack
from prunekit_kernels.sparse24 import (
    TILE_I,
    TILE_O,
    _expand24,
    compress24,
    count_broken24,
    expand24,
    expand24_reference,
)
from safetensors.torch import load_file

from tests.kernels.sparse import surrounded, two_of_four

PUBLISHED = Path(__file__).parents[1] / "published" / "compressed_tensors.safetensors"
SHAPES = [(1, 4), (3, 12), (TILE_O, TILE_I), (TILE_O + 1, TILE_I + 4), (5, 8), (0, 8), (3, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_was_compressed_comes_back(shape, dtype, device):
    weight = two_of_four(*shape, dtype, device)
    compressed = compress24(weight)
    assert compressed.values.shape == (shape[0], shape[1] // 2)
    assert torch.equal(expand24(*compressed), weight)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 6),
    st.integers(0, 9),
    st.sampled_from([*DTYPES, torch.float64, torch.int8]),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_any_shape_type_and_number_of_zeros_comes_back(outputs, groups, dtype, empty, seed):
    torch.manual_seed(seed)
    weight = two_of_four(outputs, 4 * groups, empty=empty).mul(9).to(dtype)
    assert torch.equal(expand24_reference(*compress24(weight)), weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_same_bytes_as_compressed_tensors(dtype):
    frozen = load_file(PUBLISHED)
    weight = frozen[f"{dtype}.dense"]  # every way in which a group can be filled
    values, keep = compress24(weight)
    assert torch.equal(values, frozen[f"{dtype}.two_four.compressed"])
    assert torch.equal(keep, frozen[f"{dtype}.two_four.bitmask"])


@pytest.mark.parametrize("inputs", [4, 8, 12, 300])
def test_counts_groups_without_two_kept(inputs, device):
    keep = torch.randint(0, 256, (7, -(-inputs // 8)), dtype=torch.uint8, device=device)
    groups = unpack(keep, inputs).unflatten(1, (-1, 4)).sum(2)
    assert count_broken24(keep, inputs) == int((groups != 2).sum())
    assert count_broken24(compress24(two_of_four(7, inputs, device=device)).keep, inputs) == 0


def test_nothing_is_read_outside_the_values(device):
    values = surrounded(torch.ones(9 * 130, device=device)).view(9, 130)
    keep = torch.randint(0, 256, (9, 33), dtype=torch.uint8, device=device)
    if runs_triton(values):
        assert expand24(values, keep).isfinite().all()
    keep = keep & 0x11
    assert expand24(values, keep).isfinite().all()


def test_bytes_are_nine_sixteenths_of_dense():
    weight = two_of_four(64, 256, torch.bfloat16)
    assert sum(part.nbytes for part in compress24(weight)) == 0.5625 * weight.nbytes


def test_nan_is_a_weight_like_any_other():
    weight = torch.tensor([[0, float("nan"), 0, 0]])
    assert expand24(*compress24(weight)).isnan().tolist() == [[False, True, False, False]]


def test_refuses_three_of_four():
    weight = torch.tensor([[1.0, 1, 1, 0, 1, 1, 0, 0]])
    with pytest.raises(ValueError, match="1 of 2 groups of four have more than two non-zeros"):
        compress24(weight)


def test_refuses_odd_inputs():
    with pytest.raises(ValueError, match="multiple of 4 inputs, got 6"):
        compress24(torch.zeros(2, 6))


def test_refuses_parts_of_two_matrices():
    values, keep = compress24(two_of_four(4, 16))
    with pytest.raises(ValueError, match=r"need keep bits of shape \(4, 2\) in uint8"):
        expand24(values, keep[:2])
    with pytest.raises(ValueError, match="keep bits on meta"):
        expand24(values, keep.to("meta"))


def test_any_strides(device):
    weight = two_of_four(9, 24, device=device)
    values, keep = compress24(weight)
    wide = torch.empty(9, 24, device=device).copy_(values.repeat(1, 2))
    assert torch.equal(expand24(wide[:, :12], keep.T.contiguous().T), weight)


def test_is_a_proper_op(device):
    torch.library.opcheck(_expand24, tuple(compress24(two_of_four(5, 12, device=device))))
