"""The kernels of compressed weights compile for GPUs that need not be here, without spills.

``pytest -s tests/aot`` prints the table of what each takes.
"""

import importlib
import os
import re

import pytest
import torch
from prunekit_kernels import Bitmask

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
OUTPUTS = 4096


def module(name):
    # An op hides the module of the same name.
    return importlib.import_module(f"prunekit_kernels.{name}")


def meta(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def two_of_four(inputs, dtype):
    keep = meta(OUTPUTS, -(-inputs // 8), dtype=torch.uint8)
    return meta(OUTPUTS, inputs // 2, dtype=dtype), keep


def bitmask(inputs, dtype):
    keep = two_of_four(inputs, dtype)[1]
    offsets = meta(OUTPUTS, dtype=torch.int64)
    return Bitmask(meta(OUTPUTS * inputs // 2, dtype=dtype), keep, offsets)


def x_and_out(tokens, inputs, dtype):
    return meta(tokens, inputs, dtype=dtype), meta(tokens, OUTPUTS, dtype=dtype)


def expand24(inputs, dtype):
    module("sparse24")._launch(*two_of_four(inputs, dtype), meta(OUTPUTS, inputs, dtype=dtype))


def matmul_few(inputs, dtype):
    x, out = x_and_out(1, inputs, dtype)
    module("sparse24_matmul")._launch_few(x, *two_of_four(inputs, dtype), out)


def matmul_tiles_32(inputs, dtype):
    x, out = x_and_out(32, inputs, dtype)
    module("sparse24_matmul")._launch_tiles(x, *two_of_four(inputs, dtype), out)


def matmul_tiles_64(inputs, dtype):
    x, out = x_and_out(256, inputs, dtype)
    module("sparse24_matmul")._launch_tiles(x, *two_of_four(inputs, dtype), out)


def expand_bitmask(inputs, dtype):
    module("bitmask")._launch(*bitmask(inputs, dtype), meta(OUTPUTS, inputs, dtype=dtype))


def matvec_one(inputs, dtype):
    x, out = x_and_out(1, inputs, dtype)
    module("bitmask_matvec")._launch(x, bitmask(inputs, dtype), out)


def matvec_few(inputs, dtype):
    x, out = x_and_out(16, inputs, dtype)
    module("bitmask_matvec")._launch(x, bitmask(inputs, dtype), out)


def mma_few(inputs, dtype):
    x, _ = x_and_out(16, inputs, dtype)
    module("sparse24_mma")._launch_few(x, *two_of_four(inputs, dtype))


def mma_many(inputs, dtype):
    x, _ = x_and_out(100, inputs, dtype)
    module("sparse24_mma")._launch_many(x, *two_of_four(inputs, dtype))


PORTABLE = [
    expand24, matmul_few, matmul_tiles_32, matmul_tiles_64, expand_bitmask, matvec_one, matvec_few
]  # fmt: skip
MMA = [mma_few, mma_many]


# Inputs of Llama-3.1-8B's down_proj, and a number that is only a multiple of four.
@pytest.mark.parametrize(
    ("dtype", "inputs"),
    [
        (torch.float32, 14336),
        (torch.bfloat16, 14336),
        (torch.bfloat16, 1004),
        (torch.float16, 14336),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("launch", PORTABLE)
def test_compiles_without_spills(launch, target, dtype, inputs, monkeypatch):
    (kernel,) = compiled(launch, target, dtype, inputs, monkeypatch)
    check(kernel, launch, target, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", TARGETS[:3])
@pytest.mark.parametrize("launch", MMA)
def test_sparse_tensor_cores_get_a_lanes_registers_from_one_thread(
    launch, target, dtype, monkeypatch
):
    launched = compiled(launch, target, dtype, 14336, monkeypatch)
    for kernel in launched:
        check(kernel, launch, target, dtype)
    (kernel,) = (kernel for kernel in launched if "mma.sp" in kernel.asm["ptx"])
    code = kernel.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.+)\}>", code, re.MULTILINE))
    products = re.findall(r"tt\.elementwise_inline_asm .*", code)
    assert len(products) == (8 if launch is mma_many else 1)
    for product in products:
        (layout,) = set(re.findall(r"tensor<128x4x\w+, (#\w+)>", product))
        assert "sizePerThread = [1, 4]" in layouts[layout]
        assert "threadsPerWarp = [32, 1]" in layouts[layout]
        assert "warpsPerCTA = [4, 1]" in layouts[layout]
    assert kernel.asm["ptx"].count("mma.sp::ordered_metadata") == 8 * len(products)


def compiled(launch, target, dtype, inputs, monkeypatch):
    from tests.aot.compile_only import compile_only

    with compile_only(target, monkeypatch) as launched:
        launch(inputs, dtype)
    return launched


def check(kernel, launch, target, dtype):
    from tests.aot.compile_only import SHARED_LIMITS, usage

    taken = usage(kernel)
    print(f"\n{launch.__name__:16} {target:7} {dtype!s:15} {taken}", end=" ")  # noqa: T201
    assert taken.spilled == 0
    assert taken.shared <= SHARED_LIMITS[target] * 1024
