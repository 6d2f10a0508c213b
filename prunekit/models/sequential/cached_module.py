"""Output caching for one module of a block, such as its attention.

Shapes: B samples, T tokens, D features.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from prunekit_kernels import to_host, value_of
from torch import Tensor, nn

from prunekit.models.sequential.hidden_states import HiddenStates, HiddenStatesFactory, store
from prunekit.models.sequential.tensor_slots import TensorSlots

Trace = list[tuple[nn.Module | None, Tensor]]
"""Inputs of the linears that a forward of the block calls, in order, and at the end its output."""
MAX_INPUT_WIDTH = 2
"""The input of a linear is cached if it is at most this many times as wide as the hidden states."""


@dataclass
class ModuleTraits:
    """Facts about a module of a block, observed at its first run.

    Attributes:
        length: Length of the tuple that it returns; None if it returns a tensor.
        plain: Its only output is one tensor with the shape of the hidden states.
        ends_with_linear: Its output is the output of its last linear, unchanged.
        adds: The block only adds its output to the hidden states.
    """

    length: int | None = None
    plain: bool = True
    ends_with_linear: bool = False
    adds: bool = False


class CachedModule:
    """A module whose output is cached once its linears are pruned.

    Args:
        module: The module.
        last: The linear of it that is pruned last, if it is a single one.
        new_hidden_states: Makes empty storage for cached tensors.
        traits: Facts about the module, filled in when it runs.
    """

    def __init__(
        self,
        module: nn.Module,
        last: nn.Module | None,
        new_hidden_states: HiddenStatesFactory,
        traits: ModuleTraits,
    ) -> None:
        self._module, self._last, self._traits = module, last, traits
        self._cached = TensorSlots(new_hidden_states)
        self._folded = False  # its output is part of the hidden states

    @contextmanager
    def before_last_stage(self, batch: int, hidden: Tensor) -> Iterator[None]:
        """Cache the last linear's input while only that is unpruned."""
        if not self._last:
            yield
            return

        def cache_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].numel() <= MAX_INPUT_WIDTH * hidden.numel():
                self._cached.put(("input", batch), inputs[0])

        # First of the hooks: one that observes the stage may end the forward here.
        hook = self._last.register_forward_pre_hook(cache_input, prepend=True)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def settled(self, batch: int, hidden: Tensor) -> Iterator[None]:
        """Return the cached output instead of running the module.

        An output that is not cached yet is computed and cached.
        """
        output, last_input = ("output", batch), self._cached.pop(("input", batch))
        if self._folded:
            with self._returning_zeros(hidden):
                yield
        elif output in self._cached:
            with _replaced(
                self._module, lambda *_, **__: self._as_returned(self._cached.get(output))
            ):
                yield
        elif self._last and self._traits.ends_with_linear and last_input is not None:
            last = self._last

            def run_last(*_: Any, **__: Any) -> Any:  # noqa: ANN401
                value = last(last_input)
                self._cached.put(output, value)
                return self._as_returned(value)

            with _replaced(self._module, run_last):
                yield
        else:
            with self.observed(batch, hidden):
                yield

    @contextmanager
    def observed(self, batch: int, hidden: Tensor) -> Iterator[None]:
        """Run the module, cache its output and note its traits."""
        last_outputs: list[Tensor] = []
        returned: list[Any] = []

        def note_last(_: nn.Module, __: tuple, output: Tensor) -> None:
            last_outputs[:] = [output]

        def note(_: nn.Module, __: tuple, result: Any) -> None:  # noqa: ANN401
            is_tuple, traits = isinstance(result, tuple), self._traits
            output, *rest = result if is_tuple else (result,)
            traits.length = len(result) if is_tuple else None
            returned.append(result)  # a module that is called twice has two outputs
            single = len(returned) == 1 and all(other is None for other in rest)
            traits.plain = single and output.shape == hidden.shape
            traits.ends_with_linear = (
                traits.plain and bool(last_outputs) and output is last_outputs[0]
            )
            if traits.plain:
                self._cached.put(("output", batch), output)
            else:
                self._cached.pop(("output", batch))

        with ExitStack() as stack:
            if self._traits.plain:
                stack.callback(self._module.register_forward_hook(note).remove)
                if self._last:
                    stack.callback(self._last.register_forward_hook(note_last).remove)
            yield

    def verify_residual_add(
        self, hidden: Tensor, expected: Trace, run: Callable[[Tensor], Trace]
    ) -> None:
        """Test whether the module's output is only added to the hidden states.

        Args:
            hidden: Input of the block.
            expected: Trace of the block on it, recorded when the module's output was cached.
            run: Returns the trace of the block on another input.
        """
        output = self._cached.pop(("output", 0))
        if output is None or not self._traits.ends_with_linear:
            return
        total = hidden + output
        if total.dtype != hidden.dtype:  # it would change the block's dtype
            return
        with self._returning_zeros(total):
            found = run(total)
        inside = {*self._module.modules()}
        one, other = ([x for at, x in trace if at not in inside] for trace in (expected, found))
        if [x.shape for x in one] == [x.shape for x in other]:
            same = [(x == y).all() for x, y in zip(one, other, strict=True)]
            # Adding zeros proves nothing.
            proven = torch.stack([(total != hidden).any(), *same]).all()
            self._traits.adds = value_of(to_host(proven))

    def fold_into_hidden(self, hidden: HiddenStates) -> None:
        """Add the module's output to the hidden states, where equivalent.

        It takes the cached input of the last linear of every batch; without it nothing changes.
        """
        keys = [("input", batch) for batch in range(len(hidden))]
        if not self._traits.adds or not self._last or any(key not in self._cached for key in keys):
            return
        self._folded = True
        for batch, key in enumerate(keys):
            last_input = self._cached.pop(key)
            assert last_input is not None
            store(hidden, batch, hidden[batch] + self._last(last_input))

    def _as_returned(self, output: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """Return the output in the form in which the module returns it."""
        length = self._traits.length
        return output if length is None else (output, *[None] * (length - 1))

    def _returning_zeros(self, hidden: Tensor) -> AbstractContextManager[None]:
        return _replaced(self._module, lambda *_, **__: self._as_returned(torch.zeros_like(hidden)))


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward for the time of a ``with`` block."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
