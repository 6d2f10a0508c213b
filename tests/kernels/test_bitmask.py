from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekit_kernels._triton import runs_triton
from prunekit_kernels.bitmask import (
    TILE_B,
    Bitmask,
    _expand_bitmask,
    compress_bitmask,
    expand_bitmask,
    expand_bitmask_reference,
)
from safetensors.torch import load_file

from tests.kernels.sparse import HOSTILE, surrounded, unstructured

PUBLISHED = Path(__file__).parents[1] / "published" / "compressed_tensors.safetensors"
SHAPES = [(1, 1), (3, 7), (4, 8 * TILE_B), (5, 8 * TILE_B + 1), (0, 8), (3, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_was_compressed_comes_back(shape, dtype, device):
    weight = unstructured(*shape, dtype, device)
    assert torch.equal(expand_bitmask(compress_bitmask(weight), shape[1]), weight)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 6),
    st.integers(0, 40),
    st.sampled_from([*DTYPES, torch.float64, torch.int8]),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_any_shape_type_and_mask_comes_back(outputs, inputs, dtype, sparsity, seed):
    torch.manual_seed(seed)
    weight = unstructured(outputs, inputs, sparsity=sparsity).mul(9).to(dtype)
    values, keep, _ = compress_bitmask(weight)
    assert len(values) == weight.count_nonzero()
    assert torch.equal(expand_bitmask_reference(values, keep, inputs), weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_same_bytes_as_compressed_tensors(dtype):
    frozen = load_file(PUBLISHED)
    values, keep, offsets = compress_bitmask(frozen[f"{dtype}.dense"])
    assert torch.equal(values, frozen[f"{dtype}.bitmask.compressed"])
    assert torch.equal(keep, frozen[f"{dtype}.bitmask.bitmask"])
    assert torch.equal(offsets, frozen[f"{dtype}.bitmask.row_offsets"])


def test_refuses_parts_of_two_matrices():
    compressed = compress_bitmask(unstructured(4, 16))
    with pytest.raises(ValueError, match="4 rows of 32 inputs need"):
        expand_bitmask(compressed, 32)
    with pytest.raises(ValueError, match="are on cpu, cpu, meta"):
        expand_bitmask(Bitmask(*compressed[:2], compressed.row_offsets.to("meta")), 16)


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_nothing_is_read_outside_the_values(spoil, device):
    values, keep, offsets = compress_bitmask(unstructured(5, 8 * TILE_B + 9, device=device))
    parts = Bitmask(surrounded(values), keep, spoil(offsets))
    assert expand_bitmask(parts, 8 * TILE_B + 9).isfinite().all()


def test_bits_without_values_are_zero_or_refused(device):
    values, keep, offsets = compress_bitmask(unstructured(5, 300, device=device))
    parts = Bitmask(surrounded(values), torch.full_like(keep, 255), offsets)
    if runs_triton(values):
        assert expand_bitmask(parts, 300).isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="elements of source < number of ones"):
            expand_bitmask(parts, 300)


def test_is_a_proper_op(device):
    torch.library.opcheck(
        _expand_bitmask, (*compress_bitmask(unstructured(5, 12, device=device)), 12)
    )
