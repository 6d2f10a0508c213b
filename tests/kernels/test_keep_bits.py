import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekit_kernels.keep_bits import pack_bits, unpack_bits


def test_lowest_column_is_the_lowest_bit():
    keep = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    assert pack_bits(keep).tolist() == [[0b10000101, 1]]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 5), st.integers(0, 40), st.integers(0, 2**31))
def test_what_was_packed_comes_back(outputs, inputs, seed):
    keep = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) > 0.5
    bits = pack_bits(keep)
    assert bits.shape == (outputs, -(-inputs // 8))
    assert torch.equal(unpack_bits(bits, inputs), keep)
