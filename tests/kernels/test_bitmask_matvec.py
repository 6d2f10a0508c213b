from contextlib import suppress

import pytest
import torch
from prunekit_kernels.bitmask import Bitmask, compress_bitmask
from prunekit_kernels.bitmask_matvec import (
    MOST,
    TILE_B,
    _bitmask_matvec,
    bitmask_matvec,
    bitmask_matvec_reference,
)

from tests.kernels.sparse import HOSTILE, surrounded, unstructured
from tests.support.closeness import assert_close

SHAPES = [
    (1, 1, 1),
    (1, 5, 8 * TILE_B),
    (1, 9, 8 * TILE_B + 3),
    (2, 17, 70),
    (MOST, 6, 8 * TILE_B + 9),
    (MOST + 1, 6, 40),
    (0, 8, 8),
    (2, 0, 8),
    (2, 3, 0),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("sparsity", [0.2, 0.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_product(shape, dtype, sparsity, device):
    tokens, outputs, inputs = shape
    x = torch.randn(tokens, inputs, device=device).to(dtype)
    weight = unstructured(outputs, inputs, dtype, device, sparsity)
    compressed = compress_bitmask(weight)
    plain = bitmask_matvec_reference(x, compressed)
    assert_close(bitmask_matvec(x, compressed), x.double() @ weight.double().T, plain)


@pytest.mark.parametrize("tokens", [1, 3])
def test_any_strides(tokens, device):
    x, weight = torch.randn(40, tokens, device=device).T, unstructured(9, 40, device=device)
    compressed = compress_bitmask(weight)
    plain = bitmask_matvec_reference(x, compressed)
    assert_close(bitmask_matvec(x, compressed), x.double() @ weight.double().T, plain)


def test_chunks_add_up(monkeypatch):
    monkeypatch.setitem(bitmask_matvec.__globals__, "CHUNK", 50)
    x, weight = torch.randn(3, 23), unstructured(7, 23)
    exact, plain = x.double() @ weight.double().T, x @ weight.T
    assert_close(bitmask_matvec(x, compress_bitmask(weight)), exact, plain)


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("tokens", [1, 3])
def test_nothing_is_read_outside_the_values(tokens, spoil, device, monkeypatch):
    values, keep, offsets = compress_bitmask(unstructured(5, 8 * TILE_B + 9, device=device))
    parts = Bitmask(surrounded(values), keep, spoil(offsets))
    x = torch.randn(tokens, 8 * TILE_B + 9, device=device)
    assert bitmask_matvec(x, parts).isfinite().all()
    monkeypatch.setitem(bitmask_matvec.__globals__, "CHUNK", 300)
    # A CPU, which expands in chunks, starts at the offsets and refuses values that are too few.
    with suppress(RuntimeError):
        assert bitmask_matvec(x, parts).isfinite().all()


def test_refuses_another_type():
    with pytest.raises(ValueError, match=r"x must be torch\.float32"):
        bitmask_matvec(torch.ones(2, 12).half(), compress_bitmask(unstructured(3, 12)))


def test_is_a_proper_op(device):
    compressed = compress_bitmask(unstructured(5, 12, device=device))
    torch.library.opcheck(_bitmask_matvec, (torch.randn(3, 12, device=device), *compressed, 16))
