"""Runs a block on all batches at once, halting before each stage of its linears.

A stage can be pruned on what it reads and then goes on pruned, so that one forward of the block
both gathers the statistics of every stage, each seeing the pruned ones before it, and gives what
the next block reads. Pruning stage by stage would otherwise run the block once a stage.

Shapes: B samples, T tokens, I input features.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from prunekit.errors import ConfigError


class Lockstep:
    """The forward passes of one block, each halted where the others are.

    Args:
        calls: One for each batch.
        name: Of the block.
        instead: What to write in [prune] for a block that batches pass in different ways.

    Attributes:
        outputs: What the block gave for each batch, once its stages are through.
    """

    def __init__(
        self,
        calls: Sequence[Callable[[], Tensor]],
        name: str,
        instead: str = 'propagation = "block"',
    ) -> None:
        self._passes = [_Pass(call) for call in calls]
        self._name, self._instead = name, instead
        self.outputs: list[Tensor] = []

    def stages(
        self, stages: Sequence[Sequence[nn.Module]]
    ) -> Generator[tuple[int, list[Tensor]], None, None]:
        """Yield the number of each stage, in the order in which they come, and what it reads.

        Args:
            stages: Linears that read the same tensor, which the first one called brings to a halt.
                They may be changed until the iterator is asked to go on.

        Raises:
            ConfigError: Batches come to other stages, or to the same in another order.
        """
        with self._halting(stages):
            while True:
                halts = [running.go_on() for running in self._passes]
                number = halts[0][0]
                if any(other != number for other, _ in halts):
                    raise self._astray()
                if number is None:
                    break
                yield number, [x for _, x in halts]
            self.outputs = [x for _, x in halts]

    def one_by_one(
        self, stages: Sequence[Sequence[nn.Module]]
    ) -> Generator[Iterator[Tensor], None, None]:
        """Yield for each stage an iterator of what it reads, batch by batch, to be exhausted.

        Nothing is changed on the way, so a batch goes on to its end once its last stage was looked
        at: nobody has to wait with what that one reads, which tends to be the widest.

        Raises:
            ConfigError: Batches come to other stages, or to the same in another order.
        """
        with self._halting(stages):
            for last in range(1 - len(stages), 1):
                yield self._turns(last=not last)

    def _turns(self, *, last: bool) -> Iterator[Tensor]:
        first: int | None = None
        for running in self._passes:
            number, x = running.go_on()
            first = number if first is None else first
            if number is None or number != first:
                raise self._astray()
            yield x
            if last:
                self.outputs.append(running.go_on()[1])

    def _astray(self) -> ConfigError:
        return ConfigError(
            f"{self._name}: not all batches read the same linears in the same order, as in a block "
            f"whose way depends on its data. Write {self._instead} in [prune]: then each batch "
            "passes by itself."
        )

    @contextmanager
    def _halting(self, stages: Sequence[Sequence[nn.Module]]) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(self._abandon)
            for number, linears in enumerate(stages):
                for linear in linears:
                    hook = linear.register_forward_pre_hook(_halt_at(number))
                    stack.callback(hook.remove)
            yield

    def _abandon(self) -> None:
        for running in self._passes:
            running.abandon()


def _halt_at(number: int) -> Callable[[nn.Module, tuple], None]:
    def halt(_: nn.Module, inputs: tuple) -> None:
        running = getcurrent()
        if isinstance(running, _Pass) and number not in running.seen:
            running.seen.add(number)
            assert running.parent is not None
            running.parent.switch((number, inputs[0]))

    return halt


class _Pass(greenlet):
    """One forward, which runs only while :meth:`go_on` waits for it.

    A greenlet and not a thread: threads would each bring an allocator arena and a team of OpenMP
    workers of their own, which took twice the memory and half of the speed.
    """

    def __init__(self, call: Callable[[], Tensor]) -> None:
        super().__init__(lambda: (None, call()))
        self.seen: set[int] = set()

    @torch.no_grad()
    def go_on(self) -> tuple[int | None, Tensor]:
        """Run to the next stage, or to the end: (None, output)."""
        return self.switch()

    def abandon(self) -> None:
        """End the forward where it is."""
        if not self.dead:
            self.throw()
