"""A statistic is a running sum over calibration tokens, so that parts add up to the whole.

Shapes: T tokens, I input features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from jaxtyping import Float, Shaped

from prunekit.distributed.ranks import SINGLE, Ranks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

S = TypeVar("S", bound="Statistic")
Starved = Literal["all-tokens", "magnitude", "error"]
"""What is done with an expert to which too few tokens are routed."""


class Statistic(ABC):
    """Running sums over the rows that one linear layer reads.

    Laws, held by tests: two updates equal one update of both; ``merge`` commutes; ``nbytes`` is
    what an instance holds. ``name`` is its name in plans and reports; ``every`` says that of so
    many samples one is looked at.
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
        """Return the shape of the sum for a layer with ``inputs`` input features."""

    @classmethod
    def nbytes(cls, inputs: int) -> int:
        """Return the bytes one instance holds."""
        return 4 * math.prod(cls.shape(inputs))

    @classmethod
    def flops(cls, inputs: int) -> int:
        """Return the operations that a token takes."""
        return 2 * math.prod(cls.shape(inputs))

    def update(self, x: Float[Tensor, "T I"]) -> None:
        """Add tokens; any float type, accumulated in float32."""
        self.tokens += x.shape[0]
        self.add(x)

    @abstractmethod
    def add(self, x: Float[Tensor, "T I"]) -> None:
        """Add the rows of ``x`` to ``total``."""

    def merge(self, other: Self) -> None:
        """Add what another instance saw, of other tokens or on another rank."""
        self.tokens += other.tokens
        self.total += other.total

    def parts(self) -> Iterator[Shaped[Tensor, ...]]:
        """Yield views of the sum that together are all of it that counts, each once."""
        yield self.total

    def derive(self, kind: type[S]) -> S | None:  # noqa: ARG002  for subclasses
        """Return a smaller statistic that this one contains, or None."""
        return None

    @classmethod
    def contains(cls) -> frozenset[type[Statistic]]:
        """Return the kinds that :meth:`derive` can give."""
        return frozenset()

    def finite(self) -> bool:
        """Say whether every sum is a number."""
        return bool(self.total.isfinite().all())


class StageStatistics:
    """The statistics of one stage, looked up by their class: ``stats[Gram].total``.

    Attributes:
        routed: Tokens that were routed to the expert it is about; None for other linears.
        starved: What was done because these were too few, if they were.
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
        """Return ``compute()``, done once for all linears that share these statistics."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def drop(self, kind: type[Statistic]) -> None:
        """Let go of a statistic that nobody needs any more, and of what was made ``once`` of it."""
        self._statistics = tuple(each for each in self._statistics if not isinstance(each, kind))
        self._memo.pop(kind, None)


def union(needs: Iterable[type[Statistic]]) -> tuple[type[Statistic], ...]:
    """Return what has to be gathered: each kind once, none that a bigger one contains."""
    kinds = sorted(set(needs), key=lambda kind: kind.name)
    return tuple(
        kind
        for kind in kinds
        if not any(kind in other.contains() for other in kinds if other is not kind)
    )
