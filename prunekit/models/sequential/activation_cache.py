"""What parts of a block gave, so that another look at the block does not run them again.

By stage, a block is looked at once for each stage of its linears, as the ones before it are pruned
by then. A part of it, such as its attention, is settled once none of its linears is to be pruned
any more: for a batch it gives what it gave the last time. And if all that it does after its last
linear is to give that one's output, this linear alone has to be run, on what it read the last time.
So all looks and the way to the next block cost one forward and a half, and of attention just one.

Where the block does nothing with what a part gave but add it to the hidden states, and nobody needs
those as they were, the sums take their place: then nothing is held beside them.

Shapes: B samples, T tokens, D features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Size, Tensor, nn

from prunekit.models.sequential.hidden_states import HiddenStates, store

HiddenStatesFactory = Callable[[], HiddenStates]
Call = Callable[[], Float[Tensor, "B T D"]]
Key = tuple[str, int]
Trace = list[tuple[nn.Module | None, Tensor]]
"""What linears read, in their order, and at the end what the block gives."""
WIDEST = 2
"""What a linear reads is kept if it is at most so many times as wide as the hidden states."""


@dataclass
class ModuleTraits:
    """What is found out about a part of a block, the first time that it is run.

    Attributes:
        length: Of the tuple that it answers, if it does.
        plain: It gives one tensor of the size of the hidden states.
        ends: With what its last linear gives.
        adds: The block only adds that to the hidden states.
    """

    length: int | None = None
    plain: bool = True
    ends: bool = False
    adds: bool = False


class ActivationCache:
    """What the settled parts of one block gave for each batch.

    Args:
        block: The block, or a twin of it.
        stages: Paths of its linears that are pruned, in the order in which they are run.
        shelf: Makes a place for what is kept of every batch.
        forms: What is known of parts by their paths, and will be: a block and its twin share it.

    Attributes:
        stage: Which stage is looked at; those before it are settled.
    """

    def __init__(
        self,
        block: nn.Module,
        stages: Sequence[Sequence[str]],
        shelf: HiddenStatesFactory = list,
        forms: dict[str, ModuleTraits] | None = None,
    ) -> None:
        self.stage = 0
        forms = {} if forms is None else forms
        when = {path: number for number, paths in enumerate(stages) for path in paths}
        self._linears = [block.get_submodule(path) for path in when]
        known: dict[str, _CachedModule] = {}
        self._settled: list[list[_CachedModule]] = []
        for stage in range(len(stages) + 1):
            paths = _topmost(block, when, stage)
            for path in paths:
                if path not in known:
                    last = _last(path, when)
                    form = forms.setdefault(path, ModuleTraits())
                    linear = block.get_submodule(last) if last else None
                    known[path] = _CachedModule(block.get_submodule(path), linear, shelf, form)
            self._settled.append([known[path] for path in paths])

    def around(self, batch: int, hidden: Float[Tensor, "B T D"], call: Call) -> Call:
        """Return the call of the block on a batch, with what is known of its parts."""

        def run() -> Tensor:
            settled = self._settled[self.stage]
            following = self._settled[self.stage + 1 :][:1]
            with ExitStack() as stack:
                for part in settled:
                    stack.enter_context(part.settled(batch, hidden))
                for part in following[0] if following else ():
                    if part not in settled:
                        stack.enter_context(part.settling(batch, hidden))
                return call()

        return run

    @torch.no_grad()
    def probe_residual_adds(
        self, hidden: Float[Tensor, "B T D"], bind: Callable[[Tensor], Call]
    ) -> None:
        """Find out, before any is settled, of which parts the block only adds what they give.

        With the sum in place of the hidden states and zeros in place of what a part gives the
        block has to give the same, and its other linears to read the same: of a block that is dead
        beside it what the block gives would tell nothing.

        Args:
            hidden: What the block reads, of a sample or more.
            bind: Returns the call of the block on such.
        """
        early, end = self._settled[-2:-1], self._settled[-1]
        parts = [part for settled in early for part in settled if part in end]
        if not parts:
            return
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.observed(0, hidden))
            expected = _traced(bind(hidden), self._linears)
        for part in parts:
            part.verify_residual_add(hidden, expected, lambda x: _traced(bind(x), self._linears))

    @torch.no_grad()
    def fold_into_hidden(self, hidden: HiddenStates) -> None:
        """Add what settled parts give to the hidden states, where the block does only that.

        ``hidden``: what the block reads; nobody needs it as it is.
        """
        for part in self._settled[self.stage]:
            part.fold_into_hidden(hidden)


class _CachedModule:
    """A module of a block, whose linears are all settled at some time.

    Args:
        module: The module.
        last: The linear that is pruned last of it, if it is one.
        shelf: As for :class:`Memo`.
        form: What is known of it.
    """

    def __init__(
        self,
        module: nn.Module,
        last: nn.Module | None,
        shelf: HiddenStatesFactory,
        form: ModuleTraits,
    ) -> None:
        self._module, self._last, self._form = module, last, form
        self._kept = _TensorSlots(shelf)
        self._folded = False  # what it gave is in the hidden states

    @contextmanager
    def settling(self, batch: int, hidden: Tensor) -> Iterator[None]:
        """Note what the last linear reads."""
        if not self._last:
            yield
            return

        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].numel() <= WIDEST * hidden.numel():
                self._kept.keep(("read", batch), inputs[0])

        # Whoever looks may end the forward here.
        hook = self._last.register_forward_pre_hook(note, prepend=True)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def settled(self, batch: int, hidden: Tensor) -> Iterator[None]:
        """Give what is known, or note what is given."""
        given, read = ("given", batch), self._kept.take(("read", batch))
        if self._folded:
            with self._silent(hidden):
                yield
        elif given in self._kept:
            with _instead(self._module, lambda *_, **__: self._answer(self._kept.get(given))):
                yield
        elif self._last and self._form.ends and read is not None:
            last = self._last

            def finish(*_: Any, **__: Any) -> Any:  # noqa: ANN401
                found = last(read)
                self._kept.keep(given, found)
                return self._answer(found)

            with _instead(self._module, finish):
                yield
        else:
            with self.observed(batch, hidden):
                yield

    @contextmanager
    def observed(self, batch: int, hidden: Tensor) -> Iterator[None]:
        """Note what it gives, and what kind of a part it is."""
        ends: list[Tensor] = []
        answers: list[Any] = []

        def end(_: nn.Module, __: tuple, given: Tensor) -> None:
            ends[:] = [given]

        def note(_: nn.Module, __: tuple, answer: Any) -> None:  # noqa: ANN401
            several, form = isinstance(answer, tuple), self._form
            given, *others = answer if several else (answer,)
            form.length = len(answer) if several else None
            answers.append(answer)  # a part that is called twice gives two things
            single = len(answers) == 1 and all(other is None for other in others)
            form.plain = single and given.shape == hidden.shape
            form.ends = form.plain and bool(ends) and given is ends[0]
            if form.plain:
                self._kept.keep(("given", batch), given)
            else:
                self._kept.take(("given", batch))

        with ExitStack() as stack:
            if self._form.plain:
                stack.callback(self._module.register_forward_hook(note).remove)
                if self._last:
                    stack.callback(self._last.register_forward_hook(end).remove)
            yield

    def _answer(self, given: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        length = self._form.length
        return given if length is None else (given, *[None] * (length - 1))

    def _silent(self, hidden: Tensor) -> AbstractContextManager[None]:
        """Give zeros."""
        return _instead(self._module, lambda *_, **__: self._answer(torch.zeros_like(hidden)))

    def verify_residual_add(
        self, hidden: Tensor, expected: Trace, run: Callable[[Tensor], Trace]
    ) -> None:
        """See whether all is the same outside of this if what it gave is in the hidden states.

        ``expected``: as it is, when what it gave was noted.
        """
        given = self._kept.take(("given", 0))
        if given is None or not self._form.ends:
            return
        whole = hidden + given
        # A sum in another type would have the block go on in that; zeros tell nothing.
        if whole.dtype != hidden.dtype or torch.equal(whole, hidden):
            return
        with self._silent(whole):
            found = run(whole)
        inside = {*self._module.modules()}
        one, other = ([x for at, x in trace if at not in inside] for trace in (expected, found))
        self._form.adds = len(one) == len(other) and all(map(torch.equal, one, other))

    def fold_into_hidden(self, hidden: HiddenStates) -> None:
        """Add what it gives to the hidden states, if what its last linear read is known."""
        reads = [("read", batch) for batch in range(len(hidden))]
        if not self._form.adds or not self._last or any(key not in self._kept for key in reads):
            return
        self._folded = True
        for batch, key in enumerate(reads):
            read = self._kept.take(key)
            assert read is not None
            store(hidden, batch, hidden[batch] + self._last(read))


class _TensorSlots:
    """Tensors of batches; what is kept no longer leaves its place to another of its shape."""

    def __init__(self, shelf: HiddenStatesFactory) -> None:
        self._shelf = shelf()
        self._places: dict[Key, int] = {}
        self._free: dict[Size, list[int]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def keep(self, key: Key, value: Tensor) -> None:
        """Keep a copy: nobody knows what is done with the tensor afterwards."""
        self.take(key)
        if free := self._free.get(value.shape):
            self._places[key] = free.pop()
            self._shelf[self._places[key]] = value.clone()
        else:
            self._places[key] = len(self._shelf)
            self._shelf.extend([value.clone()])

    def get(self, key: Key) -> Tensor:
        """Return a copy."""
        value = self._shelf[self._places[key]]
        return value.clone() if isinstance(self._shelf, list) else value

    def take(self, key: Key) -> Tensor | None:
        """Return what is kept, if anything is, and keep it no longer."""
        if key not in self._places:
            return None
        place = self._places.pop(key)
        value = self._shelf[place]
        self._free.setdefault(value.shape, []).append(place)
        if isinstance(self._shelf, list):
            self._shelf[place] = value.new_empty(0)
        return value


def _traced(call: Call, linears: Sequence[nn.Module]) -> Trace:
    """Return what linears read in a call, and what it gives."""
    found: Trace = []
    with ExitStack() as stack:
        for linear in linears:
            hook = linear.register_forward_pre_hook(lambda at, x: found.append((at, x[0])))
            stack.callback(hook.remove)
        given = call()
    return [*found, (None, given)]


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _topmost(block: nn.Module, when: dict[str, int], stage: int) -> list[str]:
    """Return the largest parts that have linears of stages before this one, and of no other."""
    found: list[str] = []

    def look(owner: nn.Module, front: str) -> None:
        for name, child in owner.named_children():
            path = front + name
            inside = [number for linear, number in when.items() if _inside(linear, path)]
            if not inside or min(inside) >= stage:
                continue
            # A list of modules is not called itself, and a linear by itself is soon run.
            whole = max(inside) < stage and not isinstance(child, nn.ModuleList | nn.ModuleDict)
            if whole and path not in when:
                found.append(path)
            else:
                look(child, f"{path}.")

    look(block, "")
    return found


def _last(path: str, when: dict[str, int]) -> str | None:
    inside = {linear: number for linear, number in when.items() if _inside(linear, path)}
    final = [linear for linear, number in inside.items() if number == max(inside.values())]
    return final[0] if len(final) == 1 else None
