"""Ahead-of-time compilation of launches, without a GPU.

The launchers of ``prunekit_kernels`` run on meta tensors of real sizes, so kernels are compiled
with the alignment hints and constants of a real launch; nothing executes.
"""

import contextlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton import compiler
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KEY_DIGITS = 16
"""Digits that are kept of the hash by which Triton caches a kernel."""
SHARED_LIMITS = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB per block


@dataclass(frozen=True)
class Usage:
    """Registers per thread, spilled bytes, shared bytes per block."""

    registers: int
    spilled: int
    shared: int


class _Driver(DriverBase):
    def __init__(self, target):
        self.target = target

    @classmethod
    def is_active(cls):
        return False

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return f"{self.target.backend}:{self.target.arch}"  # the key of a kernel's cache

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_benchmarker(self):
        return lambda launch, **_: launch() or [1.0, 1.0, 1.0]


@dataclass(frozen=True)
class Known:
    """Takes the place of a kernel that need not be compiled again."""

    key: str


@contextlib.contextmanager
def compile_only(name, monkeypatch, known=frozenset()):
    """Yield a list of the kernels launched within the context.

    Args:
        name: The target.
        monkeypatch: Undoes the changes to Triton.
        known: Cache keys of kernels that are not compiled: a ``Known`` takes their place.
    """
    launched, run = [], JITFunction.run

    def compile_instead(self, *args, grid, warmup, **options):
        self.device_caches.clear()  # may hold what takes the place of a kernel
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launched.append(kernel)
        if not isinstance(kernel, Known):
            kernel.storage = _storage(self.arg_names, args)
        return kernel

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_instead)
        patch.setattr(driver, "_active", None, raising=False)
        driver.set_active(_Driver(TARGETS[name]))
        if known:
            _skip_known(patch, known)
        if name.startswith("gfx"):
            patch.setattr(torch.version, "hip", "7.0")
        yield launched


def _storage(names, args):
    """Return a number for the memory of each tensor among the arguments, by name."""
    tensors = {name: each for name, each in zip(names, args, strict=False)
               if isinstance(each, torch.Tensor)}  # fmt: skip
    return {name: each.untyped_storage()._cdata for name, each in tensors.items()}


def _skip_known(patch, known):
    """Make Triton return a ``Known`` where its cache key of a kernel is known."""
    open_cache, compile_source = compiler.compiler.get_cache_manager, compiler.compile

    def open_unless_known(key):
        if key[:KEY_DIGITS] in known:
            raise _IsKnownError(key[:KEY_DIGITS])
        return open_cache(key)

    def compile_unless_known(*args, **options):
        try:
            return compile_source(*args, **options)
        except _IsKnownError as error:
            return Known(str(error))

    patch.setattr(compiler.compiler, "get_cache_manager", open_unless_known)
    patch.setattr(compiler, "compile", compile_unless_known)


class _IsKnownError(Exception):
    """A kernel with this cache key need not be compiled."""


def usage(kernel) -> Usage:
    """Return the resources that a compiled kernel uses."""
    if "cubin" not in kernel.asm:
        listing = kernel.asm["amdgcn"]
        registers, spilled = (
            int(re.findall(rf"\.{field}:\s+(\d+)", listing)[-1])
            for field in ("vgpr_count", "vgpr_spill_count")
        )
        return Usage(registers, spilled, kernel.metadata.shared)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(
        r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", output
    ).groups()
    return Usage(int(registers), int(stack) + int(local), kernel.metadata.shared)
