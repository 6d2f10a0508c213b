"""Parts of the sparse tensor core product, and its GPU kernels."""

import pytest
import torch
from prunekit_kernels.fragments24 import to_fragments, token_fragments
from prunekit_kernels.sparse24 import compress24
from prunekit_kernels.sparse24_matmul import sparse24_matmul_reference
from prunekit_kernels.sparse24_mma import (
    _sparse24_mma,
    _summed,
    in_lane_order,
    products,
    sparse24_mma,
)

from tests.kernels.sparse import two_of_four
from tests.support.closeness import assert_close

DTYPES = [torch.bfloat16, torch.float16]


def test_each_operand_is_named_once_by_each_product():
    asm, constraints = products(torch.bfloat16)
    assert len(constraints.split(",")) == 76
    lines = asm.splitlines()
    assert len(lines) == 8
    assert [line.rstrip(";").split()[-2:] for line in lines] == [
        [f"${68 + step // 2},", f"0x{step % 2}"] for step in range(8)
    ]
    named = "".join(lines)
    assert all(f"${operand}," in named or f"${operand}}}" in named for operand in range(76))


@pytest.mark.parametrize("tokens", [0, 1, 9, 40, 300])
def test_same_as_row_order(tokens, device):
    x = torch.randn(tokens, 512, device=device).bfloat16()
    weight = two_of_four(48, 512, torch.bfloat16, device)
    compressed = compress24(weight)
    plain = sparse24_matmul_reference(x, *compressed)
    y = sparse24_mma(x, *to_fragments(compressed))
    assert_close(y, x.double() @ weight.double().T, plain)


@pytest.mark.interpret
@pytest.mark.parametrize("strides", ["plain", "every other", "transposed"])
@pytest.mark.parametrize("tokens", [1, 8, 11])
def test_tokens_are_put_in_lane_order_by_one_kernel(tokens, strides, device):
    x = torch.randn(tokens, 512, device=device).bfloat16()
    if strides == "every other":
        x = torch.randn(2 * tokens, 512, device=device).bfloat16()[::2]
    elif strides == "transposed":
        x = torch.randn(512, tokens, device=device).bfloat16().T
    assert torch.equal(in_lane_order(x), token_fragments(x))


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shares_are_summed_by_one_kernel(dtype, device):
    parts = torch.randn(3, 5, 417, device=device)
    assert_close(_summed(parts, dtype), parts.double().sum(0), parts.sum(0).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 256), (48, 512), (4096, 4096), (528, 11008)], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 17, 33, 100, 256])
def test_the_kernels_on_a_gpu(tokens, shape, dtype, device):
    x = torch.randn(tokens, shape[1], device=device).to(dtype)
    weight = two_of_four(*shape, dtype, device)
    plain = x @ weight.T
    y = sparse24_mma(x, *to_fragments(compress24(weight)))
    assert_close(y, x.double() @ weight.double().T, plain)


def test_refuses_what_has_no_fragments():
    with pytest.raises(ValueError, match="multiples of 16 and inputs of 256"):
        sparse24_mma(torch.ones(1, 12), *compress24(two_of_four(4, 12)))


def test_is_a_proper_op(device):
    x = torch.randn(3, 256, device=device).half()
    fragments = to_fragments(compress24(two_of_four(16, 256, torch.float16, device)))
    torch.library.opcheck(_sparse24_mma, (x, *fragments, 256))
