"""The processes that share a run: what they add up, hand round and decide together.

Samples and rows are split over them. A single process is a world of one, in which everything here
returns at once what it was given, so that the engine is written once.

Bytes that a rank sends, of N ranks: 2 (N − 1) / N of what is added, (N − 1) / N of what is put
together or handed round, all as rings send them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self, TypeVar

from jaxtyping import Shaped

from prunekit.distributed.heartbeat import RESUME_HINT, Heartbeat
from prunekit.errors import ConfigError, RankError, StoppedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from prunekit.statistics import Statistic

T = TypeVar("T")
FOREVER = timedelta(days=30)
"""How long a rank waits for the others: one may write or judge for long, and deaths are seen by
:mod:`prunekit.distributed.heartbeat`."""
MEETING = timedelta(seconds=60)
"""How long it waits for them to be there at all."""


class Ranks:
    """This process among those that share the run; as a context it says what became of it.

    Attributes:
        rank: Which one this is, of 0..size - 1.
        size: How many there are.
        traffic: Bytes that this rank sent, by what they were for.
    """

    def __init__(self, rank: int = 0, size: int = 1, watch: Heartbeat | None = None) -> None:
        self.rank, self.size, self.watch = rank, size, watch
        self.traffic: Counter[str] = Counter()
        self._loads = [0.0] * size

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    def shards(self, total: int, unit: int = 1) -> list[slice]:
        """Return what each rank has of ``total`` items that are dealt out by ``unit`` together."""
        ends = [total // unit * rank // self.size * unit for rank in range(self.size)] + [total]
        return [slice(*pair) for pair in pairwise(ends)]

    def shard(self, total: int, unit: int = 1) -> slice:
        """Return what this rank has of them."""
        return self.shards(total, unit)[self.rank]

    def place(self, device: torch.device) -> torch.device:
        """Return the device of this rank, given what the config asks for.

        Raises:
            ConfigError: It names one GPU for all, or there are fewer than ranks on this machine.
        """
        import torch

        if not self.is_distributed or device.type != "cuda":
            return device
        if device.index is not None:
            raise ConfigError(
                f'model.device: "{device}" is one GPU, but {self.size} processes share the run. '
                'Say "cuda" or "auto": each then takes its own.'
            )
        local, count = _local_rank(self.rank), torch.cuda.device_count()
        if local >= count:
            raise ConfigError(
                f"model.device: this machine has {count} GPUs; start at most as many processes."
            )
        return torch.device("cuda", local)

    def all_reduce_sum(self, tensor: Shaped[Tensor, ...], what: str) -> None:
        """Add up a tensor over the ranks, in place; all end with the same bits."""
        if not self.is_distributed:
            return
        from torch import distributed

        with self._together():
            distributed.all_reduce(tensor)
        self.traffic[what] += 2 * tensor.nbytes * (self.size - 1) // self.size

    def merge(self, statistics: Iterable[Statistic]) -> None:
        """Make statistics those of the tokens of all ranks."""
        if not self.is_distributed:
            return
        for statistic in statistics:
            for part in statistic.parts():
                whole = part.contiguous()
                self.all_reduce_sum(whole, "statistics")
                if whole is not part:
                    part.copy_(whole)
            statistic.tokens = sum(self.all_gather_object(statistic.tokens))

    def all_gather_rows(
        self, own: Shaped[Tensor, "O I"], parts: list[slice]
    ) -> Shaped[Tensor, "N I"]:
        """Put together the rows of a matrix, of which each rank has one of ``parts``."""
        if not self.is_distributed:
            return own
        import torch
        from torch import distributed

        rows = [part.stop - part.start for part in parts]
        padded = own.new_zeros((max(rows), *own.shape[1:]))
        padded[: len(own)] = own
        # As bytes, since not every backend knows every type.
        sent = padded.view(torch.uint8)
        every = [torch.empty_like(sent) for _ in rows]
        with self._together():
            distributed.all_gather(every, sent)
        self.traffic["rows"] += (self.size - 1) * sent.nbytes
        pieces = (piece.view(own.dtype)[:count] for piece, count in zip(every, rows, strict=True))
        return torch.cat([*pieces])

    def assign(self, work: float) -> int:
        """Return which rank does ``work`` that cannot be split: who has the least of it so far.

        All ranks have to ask for the same.
        """
        owner = self._loads.index(min(self._loads))
        self._loads[owner] += work
        return owner

    def assign_each(self, works: Sequence[float]) -> list[int]:
        """Return which rank does each of several such pieces, the largest of which go first."""
        found = [0] * len(works)
        for number in sorted(range(len(works)), key=lambda number: -works[number]):
            found[number] = self.assign(works[number])
        return found

    def assign_rounds(self, work: float, count: int) -> list[int]:
        """Return which rank does each of ``count`` alike, one each in a turn of as many as ranks.

        Who has had the least begins.
        """
        found: list[int] = []
        while len(found) < count:
            waiting = sorted(range(self.size), key=lambda rank: self._loads[rank])
            for rank in waiting[: count - len(found)]:
                self._loads[rank] += work
                found.append(rank)
        return found

    def broadcast(self, owner: int, panels: Iterable[Shaped[Tensor, ...]], what: str) -> None:
        """Give tensors of the rank ``owner`` to all, in place; they may be views."""
        if not self.is_distributed:
            return
        from torch import distributed

        for panel in panels:
            whole = panel.contiguous()
            with self._together():
                distributed.broadcast(whole, src=owner)
            if whole is not panel:
                panel.copy_(whole)
            self.traffic[what] += whole.nbytes * (self.size - 1) // self.size

    def all_gather_object(self, value: T) -> list[T]:
        """Return the small value that each rank has, in their order.

        Ranks that are only planned for are taken to be alike.
        """
        if self.watch is None:
            return [value] * self.size
        from torch import distributed

        values: list[Any] = [None] * self.size
        with self._together():
            distributed.all_gather_object(values, value)
        return values

    def run_on_main(self, work: Callable[[], T], leader: int = 0) -> T:
        """Do something on one rank alone; all return, or raise, what it did. It should be small."""
        if not self.is_distributed:
            return work()
        from torch import distributed

        value, error = None, None
        if self.rank == leader:
            try:
                value = work()
            except Exception as raised:
                error = raised
        answer: list[Any] = [(value, error)]
        with self._together():
            distributed.broadcast_object_list(answer, src=leader)
        value, told = answer[0]
        if error or told:
            raise error or told
        return value

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            assert self.watch is not None
            raise RankError(self.watch.failed_rank()) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self.watch is None:
            return
        # All have agreed to stop.
        if error is not None and not isinstance(error, StoppedError):
            self.watch.report(str(error) or type(error).__name__)
            return
        from torch import distributed

        with self._together():
            distributed.barrier()
        self.watch.end()
        distributed.destroy_process_group()


SINGLE = Ranks()
"""The world of one."""


def join(device: str = "auto") -> Ranks:
    """Return this process among those that accelerate or torchrun started with it.

    Args:
        device: Where blocks will run, as in a config.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return SINGLE
    import torch
    from torch import distributed

    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=MEETING))  # pyright: ignore
    except RuntimeError as error:
        raise RankError(
            f"not all of the {size} ranks came within {MEETING.seconds} s; one may have died as it "
            f"began ({str(error).splitlines()[0]}). {RESUME_HINT}"
        ) from error
    store.set_timeout(FOREVER)
    # From now on a death is noticed, also while all connect to each other.
    watch = Heartbeat(store, rank, size)
    watch.start()
    ranks = Ranks(rank, size, watch)
    if cuda:
        torch.cuda.set_device(_local_rank(rank) % max(torch.cuda.device_count(), 1))
    with ranks._together():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=distributed.PrefixStore("prunekit", store),  # pyright: ignore
            rank=rank,
            world_size=size,
            timeout=FOREVER,
        )
    return ranks


def _local_rank(rank: int) -> int:
    return int(os.environ.get("LOCAL_RANK", rank))
