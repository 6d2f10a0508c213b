"""What parts of a block gave, so that another look at the block does not run them again.

By stage, a block is looked at once for each stage of its linears, as the ones before it are pruned
by then. A part of it, such as its attention, is settled once none of its linears is to be pruned
any more: for a batch it gives what it gave the last time. And if all that it does after its last
linear is to give that one's output, this linear alone has to be run, on what it read the last time.
So all looks and the way to the next block cost one forward and a half, and of attention just one.

Shapes: B samples, T tokens, D features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Size, Tensor, nn

from prunekit.placement import HiddenStates

Shelf = Callable[[], HiddenStates]
Call = Callable[[], Float[Tensor, "B T D"]]
Key = tuple[str, int]
WIDEST = 2
"""What a linear reads is kept if it is at most so many times as wide as the hidden states."""


class Memo:
    """What the settled parts of one block gave for each batch.

    Args:
        block: The block, or a twin of it.
        stages: Paths of its linears that are pruned, in the order in which they are run.
        shelf: Makes a place for what is kept of every batch.

    Attributes:
        stage: Which stage is looked at; those before it are settled.
    """

    def __init__(
        self, block: nn.Module, stages: Sequence[Sequence[str]], shelf: Shelf = list
    ) -> None:
        self.stage = 0
        when = {path: number for number, paths in enumerate(stages) for path in paths}
        known: dict[str, _Part] = {}
        self._settled: list[list[_Part]] = []
        for stage in range(len(stages) + 1):
            paths = _topmost(block, when, stage)
            for path in paths:
                known.setdefault(
                    path, _Part(block.get_submodule(path), _last(block, path, when), shelf)
                )
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


class _Part:
    """A module of a block, whose linears are all settled at some time.

    Args:
        module: The module.
        last: The linear that is pruned last of it, if it is one.
        shelf: As for :class:`Memo`.
    """

    def __init__(self, module: nn.Module, last: nn.Module | None, shelf: Shelf) -> None:
        self._module, self._last = module, last
        self._kept = _Kept(shelf)
        self._form: int | None = None  # of the tuple that it answers, if it does
        self._plain = True  # it gives one tensor of the size of the hidden state
        self._ends: bool | None = None  # with what its last linear gives; None: not looked yet

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
        if given in self._kept:
            with _instead(self._module, lambda *_, **__: self._answer(self._kept.get(given))):
                yield
        elif self._last and self._ends and read is not None:
            last = self._last

            def finish(*_: Any, **__: Any) -> Any:  # noqa: ANN401
                found = last(read)
                self._kept.keep(given, found)
                return self._answer(found)

            with _instead(self._module, finish):
                yield
        else:
            with self._observed(batch, hidden):
                yield

    @contextmanager
    def _observed(self, batch: int, hidden: Tensor) -> Iterator[None]:
        ends: list[Tensor] = []
        answers: list[Any] = []

        def end(_: nn.Module, __: tuple, given: Tensor) -> None:
            ends[:] = [given]

        def note(_: nn.Module, __: tuple, answer: Any) -> None:  # noqa: ANN401
            several = isinstance(answer, tuple)
            given, *others = answer if several else (answer,)
            self._form = len(answer) if several else None
            answers.append(answer)  # a part that is called twice gives two things
            single = len(answers) == 1 and all(other is None for other in others)
            self._plain = single and given.shape == hidden.shape
            self._ends = self._plain and bool(ends) and given is ends[0]
            if self._plain:
                self._kept.keep(("given", batch), given)
            else:
                self._kept.take(("given", batch))

        with ExitStack() as stack:
            if self._plain:
                stack.callback(self._module.register_forward_hook(note).remove)
                if self._last:
                    stack.callback(self._last.register_forward_hook(end).remove)
            yield

    def _answer(self, given: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        return given if self._form is None else (given, *[None] * (self._form - 1))


class _Kept:
    """Tensors of batches; what is kept no longer leaves its place to another of its shape."""

    def __init__(self, shelf: Shelf) -> None:
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


def _last(block: nn.Module, path: str, when: dict[str, int]) -> nn.Module | None:
    inside = {linear: number for linear, number in when.items() if _inside(linear, path)}
    final = [linear for linear, number in inside.items() if number == max(inside.values())]
    return block.get_submodule(final[0]) if len(final) == 1 else None
