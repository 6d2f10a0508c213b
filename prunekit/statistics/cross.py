"""Cross product: what the dense model reads with what the pruned one reads, of the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from typing_extensions import override

from prunekit.statistics.base import Statistic

if TYPE_CHECKING:
    from torch import Tensor


class Cross(Statistic):
    """``total = Σₜ dense[t] x[t]ᵀ``; with no dense stream beside it, that of a layer is ``x``."""

    name: ClassVar[str] = "cross"

    @classmethod
    @override
    def shape(cls, inputs: int) -> tuple[int, ...]:
        return (inputs, inputs)

    @override
    def add(self, x: Float[Tensor, "T I"]) -> None:
        self.add_pair(x, x)

    def update_pair(self, x: Float[Tensor, "T I"], dense: Float[Tensor, "T I"]) -> None:
        """Add tokens as the pruned and as the dense model read them."""
        self.tokens += x.shape[0]
        self.add_pair(x, dense)

    def add_pair(self, x: Float[Tensor, "T I"], dense: Float[Tensor, "T I"]) -> None:
        """Add the products of the rows of ``dense`` and ``x`` to ``total``."""
        from prunekit_kernels import cross_gram

        cross_gram(dense, x, self.total)
