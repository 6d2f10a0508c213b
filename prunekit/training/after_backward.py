"""Work on gradients that waits for the end of a backward."""

import sys
from collections.abc import Callable

import torch
from torch import nn


class AfterBackward:
    """Runs a function on parameters when the backward that reached them ends.

    All of them at once take a third of the time that they take one by one among the matrix products
    of the backward, which leave neither code nor data in the caches. The function does not wait
    where something else reads a gradient before: processes that average them, further hooks, or a
    compiled backward.
    """

    def __init__(self, run: Callable[[nn.Parameter], None]) -> None:
        """Take the function.

        Args:
            run: Called with each parameter; it may have no gradient any more.
        """
        self._run = run
        self._waiting: list[nn.Parameter] = []
        self._backward: int | None = None

    def add(self, parameter: nn.Parameter) -> None:
        """Let a parameter wait; called in a hook of its gradient."""
        if _is_read_before(parameter):
            self._run(parameter)
            return
        # One that failed never ended; a backward within one, of a checkpoint, ends before it.
        if (current := torch._C._current_graph_task_id()) != self._backward:
            self._backward = current
            torch.autograd.Variable._execution_engine.queue_callback(self.flush)  # pyright: ignore
        self._waiting.append(parameter)

    def flush(self) -> None:
        """Run on all that wait, now."""
        waiting, self._waiting, self._backward = self._waiting, [], None
        for parameter in waiting:
            self._run(parameter)


def _is_read_before(parameter: nn.Parameter) -> bool:
    """Return whether something may read the gradient before the backward ends."""
    hooks = parameter._post_accumulate_grad_hooks  # pyright: ignore[reportAttributeAccessIssue]
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    return (
        len(hooks or ()) > 1
        or (torch.distributed.is_available() and torch.distributed.is_initialized())
        or torch.compiler.is_compiling()
        or bool(compiled and compiled.compiled_autograd_enabled)
    )
