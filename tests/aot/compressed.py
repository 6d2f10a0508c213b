"""Launches of the kernels of compressed weights."""

import importlib
from collections.abc import Callable, Iterator

import torch
from prunekit_kernels import Bitmask

from tests.aot.compile_only import TARGETS
from tests.aot.launch import BF16, F16, F32, NAMES, ONE, Launch, meta

OUTPUTS = 4096
NVIDIA = tuple(target for target in TARGETS if target.startswith("sm_"))


def compressed() -> Iterator[Launch]:
    # Inputs of Llama-3.1-8B's down_proj, and a number that is only a multiple of four.
    for dtype, inputs in [(F32, 14336), (BF16, 14336)]:
        yield from _portable(dtype, inputs, (*TARGETS,))
    for dtype, inputs in [(BF16, 1004), (F16, 14336)]:
        yield from _portable(dtype, inputs, ONE)
    for dtype in (F32, BF16, F16):
        yield from sparse_tensor_cores(dtype)


def sparse_tensor_cores(dtype: torch.dtype) -> Iterator[Launch]:
    """Yield the products by ``mma.sp``, for few and for many tokens."""
    weight, inputs = _two_of_four(dtype, 14336), 14336
    for launch, tokens in (("_launch_few", 1), ("_launch_few", 16), ("_launch_many", 100)):
        run = _call("sparse24_mma", launch, meta(tokens, inputs, dtype=dtype), *weight)
        what = f"{NAMES[dtype]} I={inputs} M={tokens}"
        yield Launch("sparse24_mma", what, run, targets=ONE if dtype == F16 else NVIDIA)


def _portable(dtype: torch.dtype, inputs: int, targets: tuple[str, ...]) -> Iterator[Launch]:
    weight, bitmask = _two_of_four(dtype, inputs), _bitmask(dtype, inputs)
    dense, name = meta(OUTPUTS, inputs, dtype=dtype), f"{NAMES[dtype]} I={inputs}"
    for op, parts in (("sparse24", weight), ("bitmask", bitmask)):
        yield Launch(op, name, _call(op, "_launch", *parts, dense), targets=targets)
    for launch, tokens in (("_launch_few", 1), ("_launch_tiles", 32), ("_launch_tiles", 256)):
        x, out = meta(tokens, inputs, dtype=dtype), meta(tokens, OUTPUTS, dtype=dtype)
        run = _call("sparse24_matmul", launch, x, *weight, out)
        yield Launch("sparse24_matmul", f"{name} M={tokens}", run, targets=targets)
    for tokens in (1, 16):
        x, out = meta(tokens, inputs, dtype=dtype), meta(tokens, OUTPUTS, dtype=dtype)
        run = _call("bitmask_matvec", "_launch", x, bitmask, out)
        yield Launch("bitmask_matvec", f"{name} M={tokens}", run, targets=targets)


def _two_of_four(dtype: torch.dtype, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    keep = meta(OUTPUTS, -(-inputs // 8), dtype=torch.uint8)
    return meta(OUTPUTS, inputs // 2, dtype=dtype), keep


def _bitmask(dtype: torch.dtype, inputs: int) -> Bitmask:
    offsets = meta(OUTPUTS, dtype=torch.int64)
    values = meta(OUTPUTS * inputs // 2, dtype=dtype)
    return Bitmask(values, _two_of_four(dtype, inputs)[1], offsets)


def _call(op: str, launch: str, *arguments) -> Callable[[], object]:
    # An op hides the module of the same name.
    function = getattr(importlib.import_module(f"prunekit_kernels.{op}"), launch)
    return lambda: function(*arguments)
