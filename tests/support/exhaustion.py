"""Allocations that fail, as the libraries report it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ERRORS: dict[str, Callable[[], Exception]] = {
    "Python": MemoryError,
    "CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
}
"""What Python raises, and PyTorch on a CPU and on a GPU, by name."""


class Memory(TorchDispatchMode):
    """Memory that is used up at some operation of PyTorch in this thread.

    Attributes:
        left: Operations until then; None for memory that suffices.
        failed: Whether an operation has failed.
    """

    def __init__(self, error: str) -> None:
        super().__init__()
        self.error, self.failed = ERRORS[error], False
        self.left: int | None = None

    def __torch_dispatch__(
        self, operation: Any, _: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if self.left is not None and _allocates(operation, arguments):
            self.left -= 1
            if self.left < 0:
                self.failed = True
                raise self.error()
        return operation(*arguments, **(options or {}))


def _allocates(operation: Any, arguments: Any) -> bool:
    """Return whether an operation needs memory; reading a file takes operations that do not."""
    nothing = {"aten::set_", "aten::lift_fresh", "aten::_local_scalar_dense"}
    is_empty = operation.name().startswith("aten::empty") and [*arguments[0]] == [0]
    return not (operation.is_view or operation.name().partition(".")[0] in nothing or is_empty)


@contextmanager
def exhausted_after(operations: int, error: str) -> Iterator[Memory]:
    """Let all operations of PyTorch fail after some of them."""
    with Memory(error) as memory:
        memory.left = operations
        yield memory
