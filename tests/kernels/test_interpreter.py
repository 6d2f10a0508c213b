"""The corrected interpreter computes the same as a GPU."""

import os

import pytest
import torch
from prunekit_kernels._triton import tl, triton

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
    ),
]


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)
    spot = i[:, None] * SIZE + i[None, :]
    product = tl.dot(tl.load(a_ptr + spot), tl.load(b_ptr + spot), input_precision=PRECISION)
    tl.store(out_ptr + spot, product)


@triton.jit
def _double(x_ptr, out_ptr, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    for _ in range(n):
        x = tl.load(x_ptr + i)
        tl.store(out_ptr + i, (x + x).to(out_ptr.dtype.element_ty))


def dot(a, b, precision):
    out = torch.zeros(16, 16)
    _dot[(1,)](a, b, out, SIZE=16, PRECISION=precision)
    return out


def test_bfloat16_dot_multiplies_values():
    a, b = torch.randn(2, 16, 16).bfloat16()
    torch.testing.assert_close(dot(a, b, "ieee"), a.float() @ b.float())


def test_tf32_dot_is_less_exact_than_float32():
    a, b = torch.randn(2, 16, 16)
    exact = a.double() @ b.double()
    assert (dot(a, b, "ieee") - exact).abs().max() < 1e-5
    assert 1e-4 < (dot(a, b, "tf32") - exact).abs().max() < 1e-2


def test_bfloat16_arithmetic_rounds_to_nearest_even():
    x = torch.randn(64)
    out = torch.zeros(64, dtype=torch.bfloat16)
    _double[(1,)](x, out, 1, SIZE=64)
    assert torch.equal(out, (x + x).bfloat16())
    _double[(1,)](out, out, 1, SIZE=64)
    assert torch.equal(out, (x + x).bfloat16() * 2)
