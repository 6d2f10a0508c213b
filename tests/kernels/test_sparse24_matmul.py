import pytest
import torch
from prunekit_kernels.sparse24 import compress24
from prunekit_kernels.sparse24_matmul import (
    FEW,
    _sparse24_matmul,
    sparse24_matmul,
    sparse24_matmul_reference,
)

from tests.kernels.sparse import two_of_four
from tests.support.closeness import assert_close

SHAPES = [
    (1, 1, 4),
    (1, 64, 128),
    (3, 65, 132),
    (FEW, 70, 260),
    (FEW + 1, 65, 132),
    (40, 130, 68),
    (70, 9, 8),
    (0, 8, 8),
    (2, 0, 8),
    (2, 3, 0),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_product(shape, dtype, device):
    tokens, outputs, inputs = shape
    x = torch.randn(tokens, inputs, device=device).to(dtype)
    weight = two_of_four(outputs, inputs, dtype, device)
    compressed = compress24(weight)
    plain = sparse24_matmul_reference(x, *compressed)
    assert_close(sparse24_matmul(x, *compressed), x.double() @ weight.double().T, plain)


@pytest.mark.parametrize("strides", ["transposed", "every other"])
@pytest.mark.parametrize("tokens", [5, 20])
def test_any_strides(strides, tokens, device):
    wide = torch.randn(48, tokens, device=device) if strides == "transposed" else None
    x = wide.T if wide is not None else torch.randn(2 * tokens, 48, device=device)[::2]
    weight = two_of_four(9, 48, device=device)
    compressed = compress24(weight)
    plain = sparse24_matmul_reference(x, *compressed)
    assert_close(sparse24_matmul(x, *compressed), x.double() @ weight.double().T, plain)


def test_beyond_reach_the_weight_is_expanded(device):
    x, weight = torch.randn(9, 24, device=device), two_of_four(7, 24, device=device)
    compressed = compress24(weight)
    exact, plain = x.double() @ weight.double().T, x @ weight.T
    assert_close(sparse24_matmul(x, *compressed, reach=4), exact, plain)


def test_chunks_add_up(monkeypatch):
    monkeypatch.setitem(sparse24_matmul.__globals__, "CHUNK", 50)
    x, weight = torch.randn(3, 24), two_of_four(7, 24)
    exact, plain = x.double() @ weight.double().T, x @ weight.T
    assert_close(sparse24_matmul(x, *compress24(weight)), exact, plain)


@pytest.mark.parametrize(
    "x", [torch.ones(2, 8), torch.ones(2, 12).half(), torch.ones(12), torch.ones(2, 12).to("meta")]
)
def test_refuses_other_inputs(x):
    with pytest.raises(ValueError, match=r"x must be torch.float32 of shape \[T, 12\] on cpu"):
        sparse24_matmul(x, *compress24(two_of_four(3, 12)))


def test_is_a_proper_op(device):
    x, compressed = torch.randn(3, 12, device=device), compress24(two_of_four(5, 12, device=device))
    torch.library.opcheck(_sparse24_matmul, (x, *compressed, 256))


def test_compiles_without_graph_break(device):
    x, compressed = torch.randn(3, 12, device=device), compress24(two_of_four(5, 12, device=device))
    compiled = torch.compile(sparse24_matmul, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, *compressed), sparse24_matmul(x, *compressed))
