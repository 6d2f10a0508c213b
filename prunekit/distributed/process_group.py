"""Ranks of a process group that another library has started."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from typing_extensions import override

from prunekit.distributed.ranks import SINGLE, Ranks

T = TypeVar("T")


class ProcessGroupRanks(Ranks):
    """The processes of torch's default group, such as those of Accelerate.

    Ranks that fail are found by the timeout of the group, not by prunekit.
    """

    @override
    @contextmanager
    def collective(self, name: str, nbytes: int = 0) -> Iterator[None]:
        yield

    @override
    def all_gather_object(self, value: T) -> list[T]:
        from torch import distributed

        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values


def current_ranks() -> Ranks:
    """Return the ranks of torch's default group, if there is one."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return SINGLE
    size = distributed.get_world_size()
    return ProcessGroupRanks(distributed.get_rank(), size) if size > 1 else SINGLE
