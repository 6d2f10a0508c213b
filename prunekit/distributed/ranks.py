"""Processes (ranks) that share a run: sharding, collectives and joining.

Calibration samples and weight rows are split over the ranks. A single process is a world of one
rank, in which every collective returns its input, so the engine needs no special case.

Bytes that each of N ranks sends in ring collectives: 2 (N − 1) / N of the tensor in an all-reduce,
(N − 1) / N in an all-gather or a broadcast.

Shapes: O rows of this rank, N rows of all ranks, I columns.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self, TypeVar

from jaxtyping import Shaped

from prunekit.distributed.agreement import find_differences, flatten
from prunekit.distributed.heartbeat import Heartbeat
from prunekit.errors import ConfigError, RankError, StoppedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The ranks of a run, seen from this process.

    As a context manager it leaves the process group at the end, and reports an exception of this
    rank to the others.

    Attributes:
        rank: Rank of this process, 0..size - 1.
        size: Number of ranks.
        heartbeat: Failure detection; None in a world of one and in plans.
        traffic: Bytes that this rank has sent, by purpose.
    """

    def __init__(self, rank: int = 0, size: int = 1, heartbeat: Heartbeat | None = None) -> None:
        self.rank, self.size, self.heartbeat = rank, size, heartbeat
        self.traffic: Counter[str] = Counter()
        self._loads = [0.0] * size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are several ranks."""
        return self.size > 1

    def shards(self, total: int, unit: int = 1) -> list[slice]:
        """Split ``total`` items into a slice per rank, at multiples of ``unit``."""
        ends = [total // unit * rank // self.size * unit for rank in range(self.size)] + [total]
        return [slice(*pair) for pair in pairwise(ends)]

    def shard(self, total: int, unit: int = 1) -> slice:
        """Return the slice of this rank, see :meth:`shards`."""
        return self.shards(total, unit)[self.rank]

    def local_device(self, device: torch.device) -> torch.device:
        """Return the device of this rank for the device of the config.

        Raises:
            ConfigError: The config names a single GPU, or this machine has fewer GPUs than ranks.
        """
        import torch

        if not self.is_distributed or device.type != "cuda":
            return device
        if device.index is not None:
            raise ConfigError(
                f'model.device: "{device}" is one GPU, but {self.size} processes share the run. '
                'Write "cuda" or "auto": each process then uses its own.'
            )
        local, count = local_rank(self.rank), torch.cuda.device_count()
        if local >= count:
            raise ConfigError(
                f"model.device: this machine has {count} GPUs; start at most as many processes."
            )
        return torch.device("cuda", local)

    def all_reduce_sum(self, tensor: Shaped[Tensor, ...], purpose: str) -> None:
        """All-reduce a tensor in place; all ranks get the same bits."""
        if not self.is_distributed:
            return
        from torch import distributed

        name = f"sum of {purpose}, {_describe(tensor, tensor.shape)}"
        with self.collective(name, 2 * tensor.nbytes):
            distributed.all_reduce(tensor)
        self.traffic[purpose] += 2 * tensor.nbytes * (self.size - 1) // self.size

    def all_gather_rows(
        self, own: Shaped[Tensor, "O I"], parts: list[slice], purpose: str = "rows"
    ) -> Shaped[Tensor, "N I"]:
        """All-gather the rows of a matrix.

        Args:
            own: Rows of this rank.
            parts: The rows of each rank.
            purpose: What they are for, in the traffic and in messages.
        """
        if not self.is_distributed:
            return own
        import torch
        from torch import distributed

        rows = [part.stop - part.start for part in parts]
        padded = own.new_zeros((max(rows), *own.shape[1:]))
        padded[: len(own)] = own
        # As bytes, because some backends do not support every dtype.
        sent = padded.view(torch.uint8)
        received = [torch.empty_like(sent) for _ in rows]
        name = f"gather of {purpose}, {_describe(own, (sum(rows), *own.shape[1:]))}"
        with self.collective(name, self.size * sent.nbytes):
            distributed.all_gather(received, sent)
        self.traffic[purpose] += (self.size - 1) * sent.nbytes
        pieces = (part.view(own.dtype)[:count] for part, count in zip(received, rows, strict=True))
        return torch.cat([*pieces])

    def assign(self, work: float) -> int:
        """Assign work of some cost to the rank with the smallest load.

        All ranks must make the same calls in the same order.
        """
        owner = self._loads.index(min(self._loads))
        self._loads[owner] += work
        return owner

    def assign_each(self, works: Sequence[float]) -> list[int]:
        """Assign several pieces of work, largest first; return the rank of each."""
        owners = [0] * len(works)
        for number in sorted(range(len(works)), key=lambda number: -works[number]):
            owners[number] = self.assign(works[number])
        return owners

    def assign_rounds(self, work: float, count: int) -> list[int]:
        """Assign equal pieces of work, at most one per rank and round.

        In each round, ranks are ordered by their load so far; returns the rank of each piece.
        """
        owners: list[int] = []
        while len(owners) < count:
            by_load = sorted(range(self.size), key=lambda rank: self._loads[rank])
            for rank in by_load[: count - len(owners)]:
                self._loads[rank] += work
                owners.append(rank)
        return owners

    def broadcast(self, owner: int, panels: Iterable[Shaped[Tensor, ...]], purpose: str) -> None:
        """Broadcast tensors of one rank to all, in place.

        Args:
            owner: Rank whose values are sent.
            panels: Tensors of equal shapes on all ranks; views are allowed.
            purpose: Key under which the traffic is counted.
        """
        if not self.is_distributed:
            return
        from torch import distributed

        for panel in panels:
            whole = panel.contiguous()
            name = f"broadcast of {purpose} from rank {owner}, {_describe(whole, whole.shape)}"
            with self.collective(name, whole.nbytes):
                distributed.broadcast(whole, src=owner)
            if whole is not panel:
                panel.copy_(whole)
            self.traffic[purpose] += whole.nbytes * (self.size - 1) // self.size

    def all_gather_object(self, value: T) -> list[T]:
        """All-gather a small picklable value; the index is the rank.

        In a plan for several ranks, all are assumed to have the value of this process.
        """
        if self.heartbeat is None:
            return [value] * self.size
        from torch import distributed

        values: list[Any] = [None] * self.size
        with self.collective("gather of one value from each rank"):
            distributed.all_gather_object(values, value)
        return values

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Compare facts over the ranks: tables of values, which may be nested.

        Raises:
            ConfigError: A fact differs; the message says which, its values, and on which ranks.
        """
        if differences := self.differences(facts):
            raise ConfigError(
                "\n  ".join(["The ranks of this run differ.", *differences])
                + "\nStart all of them with the same command, config, inputs and versions."
            )

    def differences(self, facts: Mapping[str, Any]) -> list[str]:
        """Return a line for each fact that differs between ranks."""
        if self.heartbeat is None:
            return []
        every = self.all_gather_object(dict(flatten(facts)))
        names = [self.heartbeat.names([rank]) for rank in range(self.size)]
        return find_differences(every, names)

    def run_on_main(self, work: Callable[[], T], leader: int = 0) -> T:
        """Call a function on one rank; all return or raise its outcome.

        The result is broadcast as a pickle, so it should be small.
        """
        if not self.is_distributed:
            return work()
        from torch import distributed

        value, error = None, None
        if self.rank == leader:
            try:
                value = work()
            except Exception as raised:
                error = raised
        outcome: list[Any] = [(value, error)]
        with self.collective(f"result of rank {leader}"):
            distributed.broadcast_object_list(outcome, src=leader)
        value, received_error = outcome[0]
        if error or received_error:
            raise error or received_error
        return value

    @contextmanager
    def collective(self, name: str, nbytes: int = 0) -> Iterator[None]:
        """Announce a collective to the other ranks while it runs.

        Its errors become one that says which rank failed.

        Args:
            name: Kind, purpose, shape and dtype; equal on all ranks.
            nbytes: Bytes to be transferred.

        Raises:
            RankError: The network failed, or another rank.
        """
        assert self.heartbeat is not None
        try:
            with self.heartbeat.call(name, nbytes):
                yield
        except RuntimeError as error:
            raise RankError(self.heartbeat.failed_rank()) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self.heartbeat is None:
            return
        # All ranks raise a StoppedError together: it is no failure of this one.
        if error is not None and not isinstance(error, StoppedError):
            self.heartbeat.report_failure(str(error) or type(error).__name__)
            return
        from torch import distributed

        with self.collective("end of the run"):
            distributed.barrier()
        self.heartbeat.stop()
        distributed.destroy_process_group()


SINGLE = Ranks()
"""A world of one rank."""


def local_rank(rank: int) -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", rank))


def _describe(tensor: Shaped[Tensor, ...], shape: Iterable[int]) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {[*shape]}"
