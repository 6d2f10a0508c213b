"""Each lane's registers of a fragment come from one thread."""

import os
import re

import pytest

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

pytest.importorskip("triton")

from tests.aot.compile_only import compile_only  # noqa: E402
from tests.aot.compressed import NVIDIA, sparse_tensor_cores  # noqa: E402
from tests.aot.launch import BF16, F16  # noqa: E402


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize(
    ("number", "products"), [(0, 1), (1, 2), (2, 8)], ids=["one", "few", "many"]
)
def test_a_lanes_registers_come_from_one_thread(number, products, target, dtype, monkeypatch):
    with compile_only(target, monkeypatch) as launched:
        [*sparse_tensor_cores(dtype)][number].run()
    (kernel,) = (kernel for kernel in launched if "mma.sp" in kernel.asm["ptx"])
    code = kernel.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.+)\}>", code, re.MULTILINE))
    found = re.findall(r"tt\.elementwise_inline_asm .*", code)
    assert len(found) == products
    for product in found:
        (layout,) = set(re.findall(r"tensor<\d+x4x\w+, (#\w+)>", product))
        assert "sizePerThread = [1, 4]" in layouts[layout]
        assert "threadsPerWarp = [32, 1]" in layouts[layout]
        assert re.search(r"warpsPerCTA = \[[48], 1\]", layouts[layout])
    assert kernel.asm["ptx"].count("mma.sp::ordered_metadata") == 8 * products
