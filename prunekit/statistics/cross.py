"""Cross product: how what the dense model reads differs, with what the pruned one reads.

Differences are small and their products too: little of them is lost in the type that models run in,
whereas the products of both inputs would have to be subtracted from each other afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from typing_extensions import override

from prunekit.statistics.base import Statistic

if TYPE_CHECKING:
    from torch import Tensor


class CrossGram(Statistic):
    """``total = Σₜ (dense[t] − x[t]) x[t]ᵀ``; nothing where no dense stream is beside it."""

    name: ClassVar[str] = "cross"

    @classmethod
    @override
    def shape(cls, inputs: int) -> tuple[int, ...]:
        return (inputs, inputs)

    @override
    def add(self, x: Float[Tensor, "T I"]) -> None:
        pass  # the dense model is said to read the same

    def update_pair(self, x: Float[Tensor, "T I"], dense: Float[Tensor, "T I"]) -> None:
        """Add tokens as the pruned and as the dense model read them."""
        self.tokens += x.shape[0]
        self.add_pair(x, dense)

    def add_pair(self, x: Float[Tensor, "T I"], dense: Float[Tensor, "T I"]) -> None:
        """Add the products of the rows of ``dense - x`` and ``x`` to ``total``."""
        from prunekit_kernels import cross_gram

        cross_gram(dense - x, x, self.total)
