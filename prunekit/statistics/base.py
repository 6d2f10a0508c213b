"""Base of statistics: running sums over calibration tokens.

Sums of parts of the tokens, such as those of each rank, add up to the sum of all.

Shapes: T tokens, I input features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from jaxtyping import Bool, Float, Shaped

from prunekit.distributed.ranks import SINGLE, Ranks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

S = TypeVar("S", bound="Statistic")
Starved = Literal["all-tokens", "magnitude", "error"]
"""Policies for an expert to which too few tokens are routed."""


class Statistic(ABC):
    """Running sums over the input rows of a linear layer.

    Laws, checked by tests: two updates equal one update of both; ``merge`` commutes; ``nbytes`` is
    the size of an instance.

    Attributes:
        name: Name in plans and reports.
        sample_stride: One of this many samples is used.
    """

    name: ClassVar[str]
    sample_stride: ClassVar[int] = 1

    def __init__(self, inputs: int, device: torch.device | str = "cpu") -> None:
        import torch

        self.tokens = 0
        self.total = torch.zeros(self.shape(inputs), dtype=torch.float32, device=device)

    @classmethod
    @abstractmethod
    def shape(cls, inputs: int) -> tuple[int, ...]:
        """Return the shape of the sum for ``inputs`` input features."""

    @classmethod
    def nbytes(cls, inputs: int) -> int:
        """Return the size of an instance in bytes."""
        return 4 * math.prod(cls.shape(inputs))

    @classmethod
    def flops(cls, inputs: int) -> int:
        """Return the operations per token."""
        return 2 * math.prod(cls.shape(inputs))

    def update(self, x: Float[Tensor, "T I"]) -> None:
        """Add tokens of any float type; sums are in float32."""
        self.tokens += x.shape[0]
        self.add(x)

    @abstractmethod
    def add(self, x: Float[Tensor, "T I"]) -> None:
        """Add the rows of ``x`` to ``total``."""

    def merge(self, other: Self) -> None:
        """Add the sums of another instance, of other tokens."""
        self.tokens += other.tokens
        self.total += other.total

    def parts(self) -> Iterator[Shaped[Tensor, ...]]:
        """Yield views that together hold each independent element once."""
        yield self.total

    def derive(self, kind: type[S]) -> S | None:  # noqa: ARG002  for subclasses
        """Return a smaller statistic that this one contains, or None."""
        return None

    @classmethod
    def contains(cls) -> frozenset[type[Statistic]]:
        """Return the classes that :meth:`derive` can return."""
        return frozenset()

    def finite(self) -> Bool[Tensor, ""]:
        """Return whether every sum is finite, on its device."""
        return self.total.isfinite().all()


class StageStatistics:
    """The statistics of one stage, looked up by their class: ``stats[Gram].total``.

    Attributes:
        routed: Tokens routed to the expert whose linears these are; None for other linears.
        starved: The policy applied because they were too few; None if they were not.
        ranks: The processes that have the same statistics.
    """

    def __init__(
        self,
        statistics: Iterable[Statistic],
        routed: int | None = None,
        starved: Starved | None = None,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.routed, self.starved, self.ranks = routed, starved, ranks
        self._statistics = tuple(statistics)
        self._derived: dict[type[Statistic], Statistic] = {}
        self._memo: dict[Hashable, Any] = {}

    def __getitem__(self, kind: type[S]) -> S:
        for statistic in self._statistics:
            if isinstance(statistic, kind):
                return statistic
        if kind not in self._derived:
            derived = (statistic.derive(kind) for statistic in self._statistics)
            found = next((statistic for statistic in derived if statistic is not None), None)
            if found is None:
                raise KeyError(f"{kind.__name__} was not gathered; declare it in `needs`")
            self._derived[kind] = found
        return self._derived[kind]  # pyright: ignore[reportReturnType]

    def __iter__(self):  # noqa: ANN204
        return iter(self._statistics)

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Return ``compute()``, evaluated once for each key.

        Args:
            key: Identifies the value among all that linears with these statistics share.
            compute: Computes the value; nothing is stored if it raises.
        """
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def drop(self, kind: type[Statistic]) -> None:
        """Release a statistic, and the value stored under its class by :meth:`once`."""
        self._statistics = tuple(each for each in self._statistics if not isinstance(each, kind))
        self._memo.pop(kind, None)


def minimal_union(needs: Iterable[type[Statistic]]) -> tuple[type[Statistic], ...]:
    """Return the statistics to gather, without those that another contains.

    Each class is returned once, ordered by name.
    """
    kinds = sorted(set(needs), key=lambda kind: kind.name)
    return tuple(
        kind
        for kind in kinds
        if not any(kind in other.contains() for other in kinds if other is not kind)
    )


def merge(statistics: Iterable[Statistic], ranks: Ranks) -> None:
    """Sum statistics over all ranks, in place, with equal bits on each."""
    if not ranks.is_distributed:
        return
    for statistic in statistics:
        for part in statistic.parts():
            whole = part.contiguous()
            ranks.all_reduce_sum(whole, "statistics")
            if whole is not part:
                part.copy_(whole)
        statistic.tokens = sum(ranks.all_gather_object(statistic.tokens))
