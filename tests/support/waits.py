"""A device that works while the host goes on, and the places where the host would wait for it.

The CPU stands for a GPU: values on their way arrive only once they are waited for. Operations of
``prunekit_kernels`` count as one each, as what they do on a CPU is not what they do on a GPU.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from prunekit_kernels import pending
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "item", "tolist", "numpy", "cpu", "nonzero", "argwhere", "masked_select", "unique", "tensor",
    "as_tensor", "__bool__", "__int__", "__float__", "__index__", "equal",
    "allclose", "bincount", "repeat_interleave",
}  # fmt: skip
"""Functions that read values of a device, or copy pageable memory to it."""
READING_OPS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}
CPU_ONLY = {("packed_mask", "unpack"), ("obs_block", "score")}
"""Functions, by file, that read values only where the tensor is on a CPU."""
MASKED = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations that look for the entries of a mask, if they are given one."""


class Later:
    """An event of the device, passed when the host waits for it."""

    waits = 0

    def __init__(self):
        self.passed = False

    def query(self):
        return self.passed

    def synchronize(self):
        Later.waits += not self.passed
        self.passed = True

    def elapsed_time(self, _):
        return 2000.0


@contextmanager
def device_apart(monkeypatch):
    """Let the CPU be a device that the host does not wait for."""
    with monkeypatch.context() as patch:
        patch.setattr(pending, "REMOTE", {"cpu"})
        patch.setattr(pending, "_event", lambda _: Later())
        patch.setattr(pending, "_pinned", torch.empty_like)
        Later.waits = 0
        yield


class CountedReads:
    """Counts the reads of values while it is active, by function.

    Attributes:
        found: How often each function read values.
    """

    def __init__(self):
        self.found, self._inside = Counter(), 0

    def __enter__(self):
        self._modes = [_Functions(self), _Operations(self)]
        for mode in self._modes:
            mode.__enter__()
        self._wait = pending.Pending.wait
        pending.Pending.wait = self._waited
        return self

    def __exit__(self, *error):
        pending.Pending.wait = self._wait
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def note(self, name):
        """Count a read, unless it is of a value that has arrived, or of a CPU alone."""
        if not self._inside and not CPU_ONLY & set(_callers()):
            self.found[name] += 1

    @contextmanager
    def inside(self):
        """Count nothing: what happens is no read of the device."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @property
    def _waited(self):
        def wait(value):
            with self.inside():
                return self._wait(value)

        return wait


def _callers():
    """Yield file and function of each caller."""
    frame = sys._getframe(1)
    while frame:
        yield Path(frame.f_code.co_filename).stem, frame.f_code.co_name
        frame = frame.f_back


class _Functions(TorchFunctionMode):
    def __init__(self, counted):
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func, types, args=(), kwargs=None):
        empty = func is torch.tensor and not len(args[0])  # nothing is copied
        if getattr(func, "__name__", "") in READS and not empty:
            self.counted.note(func.__name__)
        return func(*args, **kwargs or {})


class _Operations(TorchDispatchMode):
    def __init__(self, counted):
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if space == "prunekit":
            with self.counted.inside():
                return func(*args, **kwargs or {})
        if name in READING_OPS or (name in MASKED and _masks(args[1])):
            self.counted.note(f"aten::{name}")
        return func(*args, **kwargs or {})


def _masks(indices):
    return any(index is not None and index.dtype == torch.bool for index in indices)
