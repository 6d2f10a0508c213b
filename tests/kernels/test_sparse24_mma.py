"""The sparse tensor core product: its parts, its kernels emulated, and on a GPU."""

import importlib

import pytest
import torch
from prunekit_kernels._triton import INTERPRETED
from prunekit_kernels.fragments24 import to_fragments, token_fragments
from prunekit_kernels.sparse24 import compress24
from prunekit_kernels.sparse24_matmul import sparse24_matmul_reference
from prunekit_kernels.sparse24_mma import (
    _launch_few,
    _launch_many,
    _sparse24_mma,
    in_lane_order,
    products,
    reading_products,
    sparse24_mma,
)

from tests.kernels.sparse import two_of_four
from tests.support.closeness import assert_close

sparse24_mma_module = importlib.import_module("prunekit_kernels.sparse24_mma")
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("assembly", "operands", "meta"), [(products, 76, 68), (reading_products, 48, 36)]
)
def test_each_operand_is_named_by_the_products(assembly, operands, meta):
    asm, constraints = assembly(torch.bfloat16)
    assert len(constraints.split(",")) == operands
    lines = [line for line in asm.splitlines() if line.startswith("mma")]
    assert [line.rstrip(";").split()[-2:] for line in lines] == [
        [f"${meta + step // 2},", f"0x{step % 2}"] for step in range(8)
    ]
    assert all(any(f"${operand}{end}" in asm for end in ",}+") for operand in range(operands))


@pytest.mark.skipif(not INTERPRETED, reason="the emulator belongs to the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("launch", "shape"),
    [
        (_launch_few, (1, 48, 512)), (_launch_few, (8, 16, 1280)), (_launch_few, (9, 32, 2304)),
        (_launch_few, (16, 16, 256)), (_launch_many, (19, 48, 512)),
        (_launch_many, (40, 160, 256)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # the same in all processes
)  # fmt: skip
@pytest.mark.parametrize("tiles_are_few", [True, False])
def test_the_kernels_emulated(launch, shape, dtype, tiles_are_few, monkeypatch):
    from tests.kernels import ptx

    ptx.install(monkeypatch)
    monkeypatch.setattr(sparse24_mma_module, "multiprocessors", lambda _: 99 * tiles_are_few)
    tokens, outputs, inputs = shape
    x = torch.randn(tokens, inputs).to(dtype)
    weight = two_of_four(outputs, inputs, dtype)
    y = launch(x, *to_fragments(compress24(weight)))
    assert_close(y, x.double() @ weight.double().T, x @ weight.T)


@pytest.mark.skipif(not INTERPRETED, reason="the emulator belongs to the interpreter")
@pytest.mark.parametrize("strides", ["every other", "odd offset", "transposed"])
def test_tokens_of_any_strides_emulated(strides, monkeypatch):
    from tests.kernels import ptx

    ptx.install(monkeypatch)
    x = torch.randn(512, 512).bfloat16()
    x = {
        "every other": x[:6:2], "transposed": x[:, :3].T,
        "odd offset": x.flatten()[1:1537].view(3, 512),
    }[strides]  # fmt: skip
    weight = two_of_four(16, 512, torch.bfloat16)
    y = _launch_few(x, *to_fragments(compress24(weight)))
    assert_close(y, x.double() @ weight.double().T, x @ weight.T)


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
